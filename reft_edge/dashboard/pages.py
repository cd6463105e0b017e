"""The pages, drawn with NiceGUI, whose types stay in this file and in `serving`.

Each page is a frame (what run, where it stands, the way to the other pages) and some parts. A part draws itself once
and then takes in pictures; a page asks the source some times a second whether there is a new one. Everything that came
from devices is set as text, never as HTML.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nicegui import ui

from reft_edge.coordinator.report.page import metric_text
from reft_edge.dashboard import charts, rows

if TYPE_CHECKING:
    from reft_edge.coordinator.report.record import RunReport
    from reft_edge.dashboard.source import Picture, Source

REFRESH_S = 0.5
"""How often a page looks whether anything is new."""

CLOCK_S = 10.0
"""How often "heard of 5 s ago" is worded anew when nothing else is."""

PAGES = {"Fleet": "/", "Round": "/round", "Curves": "/curves", "Family": "/family", "Rejected": "/rejected"}

Part = Callable[["Picture"], None]
"""Takes in a picture."""

STATE_CELL = '<q-td :props="props"><q-badge :color="props.row.colour">{{ props.value }}</q-badge></q-td>'
PROGRESS_CELL = (
    '<q-td :props="props"><q-linear-progress :value="props.value" size="10px" rounded instant-feedback '
    'style="min-width: 8rem" aria-label="progress" /></q-td>'
)


CARD = """
<div class="q-pa-xs col-12">
  <q-card flat bordered class="q-pa-sm">
    <div class="row items-center q-gutter-x-sm">
      <b>{{ props.cols[0].value }}</b>
      <q-badge v-if="props.row.colour" :color="props.row.colour">{{ props.row.state }}</q-badge>
    </div>
    <q-linear-progress v-if="props.row.progress !== undefined" :value="props.row.progress" size="10px" rounded
      instant-feedback class="q-my-xs" aria-label="progress" />
    <div class="row q-gutter-x-md text-caption">
      <span v-for="column in props.cols.slice(1)" :key="column.name"
        v-show="!['state', 'progress'].includes(column.name) && column.value !== '-' && column.value !== ''">
        <span class="opacity-70">{{ column.label }}</span> {{ column.value }}
      </span>
    </div>
  </q-card>
</div>
"""
"""A row of a table on a phone: what is known, close together. Vue escapes what stands in double braces."""


def register(source: Source) -> None:
    """Make the pages known to NiceGUI."""

    @ui.page("/")
    def fleet() -> None:
        with _page(source, "Fleet") as parts:
            parts.append(_table("Devices", rows.FLEET, _devices, state=True))

    @ui.page("/round")
    def present_round() -> None:
        with _page(source, "Round") as parts:
            parts.append(_round())

    @ui.page("/curves")
    def curves() -> None:
        with _page(source, "Curves") as parts:
            parts.append(_chart("On test data, by round", charts.metric_by_round))
            parts.append(_chart("Over the air", charts.bytes_by_round))
            parts.append(
                _chart("Predicted against measured time of a device's round", charts.predicted_against_measured)
            )

    @ui.page("/family")
    def family() -> None:
        with _page(source, "Family") as parts:
            parts.append(_chart("From the whole model to what devices train", charts.family_tree, height="26rem"))
            parts.append(
                _table("Rounds", rows.ROUNDS, lambda picture: rows.rounds(picture.report) if picture.report else [])
            )
            parts.append(
                _table("Exported", rows.EXPORTS, lambda picture: rows.exports(picture.report) if picture.report else [])
            )

    @ui.page("/rejected")
    def rejected() -> None:
        with _page(source, "Rejected") as parts:
            parts.append(
                _table(
                    "Rejected updates",
                    rows.REJECTED,
                    lambda picture: rows.rejected(picture.report) if picture.report else [],
                )
            )
            parts.append(
                _table("In quarantine", rows.QUARANTINED, lambda picture: rows.quarantined(picture.quarantined))
            )
            parts.append(
                _table(
                    "Got no task",
                    rows.LEFT_OUT,
                    lambda picture: rows.left_out(picture.report) if picture.report else [],
                )
            )


@contextmanager
def _page(source: Source, name: str) -> Iterator[list[Part]]:
    """A frame; what the block appends is kept up to date for as long as somebody looks."""
    parts: list[Part] = [_header(name)]
    with ui.column().classes("w-full max-w-screen-xl mx-auto p-2 sm:p-4 gap-4"):
        parts.append(_summary())
        yield parts
    shown: list[float] = []

    def refresh() -> None:
        picture = source.picture
        moment = time.monotonic() // CLOCK_S
        if shown != [picture.version, moment]:
            shown[:] = [picture.version, moment]
            for part in parts:
                part(picture)

    refresh()
    ui.timer(REFRESH_S, refresh)


def _header(name: str) -> Part:
    with ui.header().classes("items-center gap-x-6 gap-y-0 px-4 py-2 flex-wrap"):
        title = ui.label("reft-edge").classes("text-lg font-medium")
        with ui.row().classes("gap-x-4 gap-y-0"):
            for other, path in PAGES.items():
                link = ui.link(other, path).classes("text-white no-underline py-1")
                if other == name:
                    link.classes("font-bold border-b-2").props("aria-current=page")

    def show(picture: Picture) -> None:
        if picture.overview is not None:
            title.text = picture.overview.federation

    return show


def _summary() -> Part:
    """Where the run stands, in one line and some tiles."""
    line = ui.label().classes("text-base")
    trouble = ui.label().classes("text-red-700 dark:text-red-300")
    with ui.element("div").classes("grid grid-cols-2 md:grid-cols-4 gap-3 w-full") as tiles:
        place, value, devices, trained = (_tile() for _ in range(4))

    def show(picture: Picture) -> None:
        state = picture.overview
        trouble.text = picture.trouble or (state.reason if state is not None else "")
        trouble.visible = bool(trouble.text)
        tiles.visible = state is not None
        if state is None or picture.report is None:
            line.text = "There is nothing to show yet."
            return
        line.text = f"Run {state.run}: {state.phase}"
        place(f"{state.round} of {state.rounds}", "round")
        place_value = metric_text(picture.report.value, state.metric)
        value(place_value, f"{state.metric} on test data")
        online = sum(one.state not in ("offline", "waiting") for one in state.devices)
        devices(f"{online} of {len(state.devices)}", "devices are there")
        busy = sum(one.state in ("fetching", "training", "uploading") for one in state.devices)
        trained(str(busy), "are at work")

    return show


def _tile() -> Callable[[str, str], None]:
    with ui.card().classes("p-3 gap-0"):
        figure = ui.label("-").classes("text-2xl")
        caption = ui.label("").classes("text-sm opacity-70")

    def show(value: str, words: str) -> None:
        figure.text, caption.text = value, words

    return show


def _devices(picture: Picture) -> list[rows.Row]:
    return [] if picture.overview is None else rows.fleet(picture.overview.devices, time.time())


def _round() -> Part:
    words = ui.label().classes("text-base")
    table = _table(
        "Devices in this round",
        rows.ROUND,
        lambda picture: [] if picture.overview is None else rows.present_round(picture.overview.devices),
        state=True,
        progress=True,
    )

    def show(picture: Picture) -> None:
        distilling = picture.distilling
        words.visible = distilling is not None
        if distilling is not None:
            words.text = f"Distilling: epoch {distilling.epoch} of {distilling.epochs}, loss {distilling.loss:.4f}"
        table(picture)

    return show


def _table(
    title: str,
    columns: list[rows.Column],
    content: Callable[[Picture], list[rows.Row]],
    *,
    state: bool = False,
    progress: bool = False,
) -> Part:
    """A table that is cards on a phone, and says so when it is empty."""
    key = columns[0]["field"]
    table = ui.table(columns=columns, rows=[], row_key=key, title=title).classes("w-full")
    table.props(
        'flat bordered dense wrap-cells hide-pagination :grid="Quasar.Screen.lt.sm" no-data-label="Nothing yet."'
    )
    table.props(':rows-per-page-options="[0]"')
    table.add_slot("item", CARD)
    if state:
        table.add_slot("body-cell-state", STATE_CELL)
    if progress:
        table.add_slot("body-cell-progress", PROGRESS_CELL)

    def show(picture: Picture) -> None:
        table.rows = content(picture)

    return show


def _chart(title: str, draw: Callable[[RunReport], charts.Options], *, height: str = "20rem") -> Part:
    with ui.card().classes("w-full"):
        ui.label(title).classes("text-base font-medium")
        chart = ui.echart({}).classes("w-full").style(f"height: {height}")

    def show(picture: Picture) -> None:
        if picture.report is None:
            return
        options = draw(picture.report)
        if chart.options != options:
            chart.options.clear()
            chart.options.update(options)
            chart.update()

    return show
