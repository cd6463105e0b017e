"""The pages: which parts stand on each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nicegui import Event, ui

from reft_edge.dashboard import charts, rows
from reft_edge.dashboard.parts import chart, of_figures, page, table, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from reft_edge.coordinator.report.record import RunReport
    from reft_edge.dashboard.source import Picture, Source


def register(source: Source, news: Event[[]]) -> None:
    """Make the pages known to NiceGUI. `news`: see `parts.page`."""

    @ui.page("/", title="Fleet")
    def fleet() -> None:
        with page(source, news, "Fleet") as parts:
            parts.append(
                table(
                    "Devices",
                    rows.FLEET,
                    lambda picture: [] if picture.overview is None else rows.fleet(picture.overview.devices),
                    nothing="No device was heard of yet. Agents announce themselves when they reach the broker.",
                    lanes=True,
                )
            )

    @ui.page("/round", title="Round")
    def present_round() -> None:
        with page(source, news, "Round") as parts:
            parts.append(words(_about_the_round))
            parts.append(
                table(
                    "Devices in this round",
                    rows.ROUND,
                    lambda picture: [] if picture.overview is None else rows.present_round(picture.overview),
                    nothing="No round has begun.",
                    lanes=True,
                )
            )

    @ui.page("/curves", title="Curves")
    def curves() -> None:
        with page(source, news, "Curves") as parts:
            for title, draw in (
                ("On test data, by round", charts.metric_by_round),
                ("Over the air", charts.bytes_by_round),
                ("Predicted against measured time of a device's round", charts.predicted_against_measured),
            ):
                parts.append(of_figures(chart(title, _of_report(draw))))

    @ui.page("/family", title="Family")
    def family() -> None:
        with page(source, news, "Family") as parts:
            parts.append(
                of_figures(
                    chart(
                        "From the whole model to what devices train",
                        lambda picture: charts.family_tree(picture.report),
                        height="26rem",
                    )
                )
            )
            parts.append(
                of_figures(
                    table(
                        "Rounds",
                        rows.ROUNDS,
                        lambda picture: rows.rounds(picture.report),
                        nothing="No round has been merged yet.",
                    )
                )
            )
            parts.append(
                of_figures(
                    table(
                        "Exported",
                        rows.EXPORTS,
                        lambda picture: rows.exports(picture.report),
                        nothing="Models are exported when the run has finished.",
                    )
                )
            )

    @ui.page("/rejected", title="Rejected")
    def rejected() -> None:
        with page(source, news, "Rejected") as parts:
            parts.append(
                of_figures(
                    table(
                        "Rejected updates",
                        rows.REJECTED,
                        lambda picture: rows.rejected(picture.report),
                        nothing="Every update of this run was of use.",
                    )
                )
            )
            parts.append(
                table(
                    "In quarantine",
                    rows.QUARANTINED,
                    lambda picture: rows.quarantined(picture.quarantined),
                    nothing="Nobody.",
                )
            )
            parts.append(
                of_figures(
                    table(
                        "Got no task",
                        rows.LEFT_OUT,
                        lambda picture: rows.left_out(picture.report),
                        nothing="Every device that was there got a task.",
                    )
                )
            )


def _of_report(draw: Callable[[RunReport], charts.Options]) -> Callable[[Picture], charts.Options]:
    return lambda picture: draw(picture.report)


def _about_the_round(picture: Picture) -> str:
    told = picture.distilling
    if told is not None:
        return f"Distilling: epoch {told.epoch} of {told.epochs}, loss {told.loss:.4f}"
    state = picture.overview
    if state is None or state.deadline is None:
        return ""
    return f"Updates are waited for until {rows.clock_text(state.deadline)}."
