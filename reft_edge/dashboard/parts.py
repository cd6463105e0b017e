"""What pages are made of, drawn with NiceGUI, whose types stay in `parts`, `rollout`, `pages`, `live_table`, `serving`.

A page is a frame (what run, where it stands, the way to the other pages) and some parts. A part draws itself once and
then takes in pictures; of what it shows already it sends nothing. Everything that came from devices is set as text,
never as HTML.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING

from nicegui import Event, ui

from reft_edge.coordinator.report.figures import metric_text
from reft_edge.dashboard.live_table import LiveTable

if TYPE_CHECKING:
    from reft_edge.coordinator.overview import RunOverview
    from reft_edge.dashboard import charts, rows
    from reft_edge.dashboard.source import Picture, Source

FIGURES_S = 2.0
"""How often curves and the like are drawn while updates come in."""

PAGES = {
    "Fleet": "/",
    "Round": "/round",
    "Curves": "/curves",
    "Family": "/family",
    "Rejected": "/rejected",
    "Deployments": "/deployments",
    "Drift": "/drift",
}

Part = Callable[["Picture"], None]
"""Takes in a picture."""

NOT_THERE = ("offline", "waiting", "absent")
AT_WORK = ("fetching", "training", "uploading")


@contextmanager
def page(source: Source, news: Event[[]], name: str) -> Iterator[list[Part]]:
    """A frame; what the block appends is kept up to date for as long as somebody looks.

    `news` comes with every new picture, and now and then without.
    """
    ui.add_head_html(f"<style>{_style()}</style>")
    parts: list[Part] = [_header(name)]
    with ui.element("main").classes("page"):
        parts.append(_summary())
        yield parts
    shown: list[object] = []

    def refresh() -> None:
        for part in parts:
            part(source.picture)

    def refresh_if_new() -> None:
        picture = source.picture
        moment = time.monotonic() // FIGURES_S
        if shown != [picture.version, moment]:
            shown[:] = [picture.version, moment]
            refresh()

    refresh()
    news.subscribe(refresh_if_new)


def _style() -> str:
    return resources.files("reft_edge.dashboard").joinpath("style.css").read_text(encoding="utf-8")


def _header(name: str) -> Part:
    with ui.element("header").classes("top"):
        with ui.element("h1"):
            title = ui.label("reft-edge")
        with ui.element("nav"):
            for other, path in PAGES.items():
                link = ui.link(other, path)
                if other == name:
                    link.props("aria-current=page")

    def show(picture: Picture) -> None:
        if picture.overview is not None:
            say(title, picture.overview.federation)

    return show


def _summary() -> Part:
    """Where the run stands, in one line and some tiles."""
    with ui.element("div").classes("standing"):
        state, line = badge(), ui.label()
    trouble = ui.label().classes("trouble").props("role=status")
    with ui.element("div").classes("tiles") as tiles:
        place, value, devices, busy, served = (_tile() for _ in range(5))

    def show(picture: Picture) -> None:
        found = picture.overview
        words = picture.trouble or (found.reason if found is not None else "")
        say(trouble, words)
        see(trouble, bool(words))
        see(tiles, found is not None)
        if found is None:
            state("nothing yet", "quiet")
            say(line, "There is nothing to show yet.")
            trouble.classes(add="hint")
            return
        trouble.classes(remove="hint")
        state(*_standing(found))
        phase = found.phase.removeprefix("interrupted: ")  # as the badge says
        say(line, f"Run {found.run}: {phase}" if found.run else phase)
        place(f"{found.round} of {found.rounds}" if found.rounds else "-", "round")
        last = next((one for one in reversed(found.values) if one is not None), None)
        value(metric_text(last, found.metric), f"{found.metric} on test data")
        here = sum(one.state not in NOT_THERE for one in found.devices)
        when = "devices are there" if found.watched else "devices were there when heard last"
        devices(f"{here} of {len(found.devices)}", when)
        busy(str(sum(one.state in AT_WORK for one in found.devices)), "are at work")
        served(*_served(found))

    return show


def _standing(found: RunOverview) -> tuple[str, rows.Tone]:
    if found.state == "failed":
        return "failed", "bad"
    if found.state == "finished":
        return "finished", "good"
    if found.state is None:
        return "no run", "quiet"
    return ("running", "busy") if found.at_work else ("interrupted", "warn")


def _served(found: RunOverview) -> tuple[str, str]:
    """How many devices serve what most serve."""
    versions = [one.serving.version for one in found.devices if one.serving is not None]
    if not versions:
        return "-", "nothing is deployed"
    most = max(set(versions), key=lambda version: (versions.count(version), version))
    return f"{versions.count(most)} of {len(found.devices)}", f"serve {most}"


def _tile() -> Callable[[str, str], None]:
    with ui.element("div").classes("tile"):
        figure = ui.label("-").classes("figure")
        caption = ui.label("").classes("caption")

    def show(value: str, words: str) -> None:
        say(figure, value)
        say(caption, words)

    return show


def badge() -> Callable[[str, rows.Tone], None]:
    """A word on its tone's colour."""
    label = ui.label().classes("badge")

    def show(word: str, tone: rows.Tone) -> None:
        say(label, word)
        if tone not in label.classes:
            label.classes(replace=f"badge {tone}")

    return show


def words(content: Callable[[Picture], str]) -> Part:
    """A line that is there when there is something to say."""
    label = ui.label().classes("faint")

    def show(picture: Picture) -> None:
        text = content(picture)
        say(label, text)
        see(label, bool(text))

    return show


def table(
    title: str,
    columns: Sequence[rows.Column],
    content: Callable[[Picture], list[rows.Row]],
    *,
    nothing: str,
    lanes: bool = False,
) -> Part:
    """A table that is cards on a phone, and says `nothing` when it is empty."""
    element = LiveTable(title, columns, nothing=nothing, lanes=lanes)
    return lambda picture: element.show(content(picture))


def chart(title: str, draw: Callable[[Picture], charts.Options], *, nothing: str, height: str = "20rem") -> Part:
    """A chart; `nothing` in its place until there is a point to draw."""
    with ui.element("section").classes("card"):
        with ui.element("h2"):
            ui.label(title)
        empty = ui.label(nothing).classes("faint")
        drawn = ui.echart({}).style(f"width: 100%; height: {height}")
    see(drawn, False)

    def show(picture: Picture) -> None:
        options = draw(picture)
        there = any(series["data"] for series in options["series"])
        see(empty, not there)
        see(drawn, there)
        if there and drawn.options != options:
            drawn.options.clear()
            drawn.options.update(options)
            drawn.update()

    return show


def of_figures(part: Part, *, also: Callable[[Picture], object] = lambda _: None) -> Part:
    """`part`, which shows the run's report, drawn when that or what it shows `also` has changed; not each update."""
    shown: list[object] = []
    due = 0.0

    def show(picture: Picture) -> None:
        nonlocal due
        if picture.overview is None or (shown and time.monotonic() < due):
            return
        now = [picture.overview.run, picture.n_figures, also(picture)]
        if shown != now:
            part(picture)
            shown[:] = now
            due = time.monotonic() + FIGURES_S

    return show


def of_counts(part: Part) -> Part:
    """`part`, which shows what devices predict, drawn when they have told anything new."""
    shown: list[object] = []

    def show(picture: Picture) -> None:
        if shown != [picture.conditions]:
            part(picture)
            shown[:] = [picture.conditions]

    return show


def say(label: ui.label, text: str) -> None:
    """Make it say this, and send nothing where it does."""
    if label.text != text:
        label.set_text(text)


def see(element: ui.element, visible: bool) -> None:
    """Show or hide it, and send nothing where it is so."""
    if element.visible != visible:
        element.set_visibility(visible)
