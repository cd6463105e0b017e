"""The pages: which parts stand on each."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from nicegui import Event, ui

from reft_edge.coordinator.drift import class_names
from reft_edge.coordinator.run_files import find_deployed
from reft_edge.dashboard import charts, deployment_rows, rows
from reft_edge.dashboard.parts import chart, of_counts, of_figures, page, table, words
from reft_edge.dashboard.rollout import rollout
from reft_edge.errors import FederationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from reft_edge.coordinator.overview import DeviceOverview
    from reft_edge.coordinator.records import DeployedDevice
    from reft_edge.coordinator.report.record import RunReport
    from reft_edge.dashboard.source import Picture, Source


def register(source: Source, news: Event[[]]) -> None:
    """Make the pages known to NiceGUI. `news`: see `parts.page`."""
    _pages_of_now(source, news)
    _page_of_curves(source, news)
    _page_of_the_family(source, news)
    _page_of_what_was_rejected(source, news)
    _pages_of_deployments(source, news)
    _pages_of_drift(source, news)


def _pages_of_now(source: Source, news: Event[[]]) -> None:
    @ui.page("/", title="Fleet")
    def fleet() -> None:
        with page(source, news, "Fleet") as parts:
            parts.append(
                table(
                    "Devices",
                    rows.FLEET,
                    lambda picture: rows.fleet(_devices(picture)),
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


def _page_of_curves(source: Source, news: Event[[]]) -> None:
    @ui.page("/curves", title="Curves")
    def curves() -> None:
        with page(source, news, "Curves") as parts:
            for title, draw in (
                ("On test data, by round", charts.metric_by_round),
                ("Over the air", charts.bytes_by_round),
                ("Predicted against measured time of a device's round", charts.predicted_against_measured),
            ):
                parts.append(of_figures(chart(title, _of_report(draw), nothing="No round has ended yet.")))


def _page_of_the_family(source: Source, news: Event[[]]) -> None:
    @ui.page("/family", title="Family")
    def family() -> None:
        with page(source, news, "Family") as parts:
            parts.append(
                of_figures(
                    chart(
                        "From the whole model to what devices train and serve",
                        lambda picture: charts.family_tree(picture.report, _devices(picture)),
                        nothing="No device was given a variant yet.",
                        height="26rem",
                    ),
                    also=lambda picture: picture.conditions,
                )
            )
            parts.append(
                table(
                    "Served now",
                    deployment_rows.SERVED,
                    lambda picture: deployment_rows.served(_devices(picture)),
                    nothing="No device serves a model. reft-edge deploy rolls one out.",
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


def _page_of_what_was_rejected(source: Source, news: Event[[]]) -> None:
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


def _pages_of_deployments(source: Source, news: Event[[]]) -> None:
    @ui.page("/deployments", title="Deployments")
    def deployments() -> None:
        with page(source, news, "Deployments") as parts:
            parts.append(rollout())
            parts.append(
                table(
                    "All deployments",
                    deployment_rows.DEPLOYMENTS,
                    lambda picture: deployment_rows.deployments(picture.deployments),
                    nothing="Nothing was deployed yet. reft-edge deploy federation.toml rolls out the latest model.",
                )
            )

    @ui.page("/deployments/{name}", title="Deployment")
    async def deployment(name: str) -> None:
        past: list[DeployedDevice] = []
        with contextlib.suppress(FederationError):  # there is no store yet, as the page says
            past = await asyncio.to_thread(find_deployed, source.settings_file, name)
        with page(source, news, "Deployments") as parts:
            parts.append(rollout(name, tuple(past)))


def _pages_of_drift(source: Source, news: Event[[]]) -> None:
    @ui.page("/drift", title="Drift")
    def drift() -> None:
        with page(source, news, "Drift") as parts:
            parts.append(
                table(
                    "Devices that tell what they predict",
                    deployment_rows.PREDICTING,
                    lambda picture: deployment_rows.predicting(picture.conditions, picture.departures),
                    nothing="No device tells. Its owner allows it with [serving] report = true in agent.toml; only "
                    "counts are told, never inputs.",
                )
            )

    @ui.page("/drift/{device}", title="Drift")
    def drift_of(device: str) -> None:
        with page(source, news, "Drift") as parts:
            parts.append(words(lambda picture: _departs(picture, device)))
            for title, draw in (
                (f"What {device} predicts, beside the others that serve the same version", charts.classes),
                ("How sure it is", charts.confidence),
            ):
                parts.append(of_counts(chart(title, _of_device(device, draw), nothing="It tells no such counts.")))


def _devices(picture: Picture) -> list[DeviceOverview]:
    return [] if picture.overview is None else picture.overview.devices


def _classes(picture: Picture, device: str) -> tuple[str, ...]:
    """Names of the classes that a device tells apart, where its version was deployed with names."""
    told = next((one.condition.counts for one in picture.conditions if one.device == device), None)
    return () if told is None else class_names(picture.deployments).get(told.version, ())


def _departs(picture: Picture, device: str) -> str:
    found = [one for one in picture.departures if one.device == device]
    if found:
        return f"{device} {'; '.join(one.reason for one in found)}."
    return f"{device} predicts as the others that serve the same version do, as far as its counts tell."


def _of_report(draw: Callable[[RunReport], charts.Options]) -> Callable[[Picture], charts.Options]:
    return lambda picture: draw(picture.report)


def _of_device(device: str, draw: charts.OfDevice) -> Callable[[Picture], charts.Options]:
    return lambda picture: draw(picture.conditions, device, _classes(picture, device))


def _about_the_round(picture: Picture) -> str:
    told = picture.distilling
    if told is not None:
        return f"Distilling: epoch {told.epoch} of {told.epochs}, loss {told.loss:.4f}"
    state = picture.overview
    if state is None or state.deadline is None:
        return ""
    return f"Updates are waited for until {rows.clock_text(state.deadline)}."
