"""One deployment as it goes: how far it is, and what became of it on each device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nicegui import ui

from reft_edge.coordinator.report.times import time_text
from reft_edge.dashboard import deployment_rows
from reft_edge.dashboard.parts import badge, say, see, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reft_edge.coordinator.records import DeployedDevice, DeploymentRecord
    from reft_edge.dashboard.parts import Part
    from reft_edge.dashboard.rows import Row
    from reft_edge.dashboard.source import Picture


def rollout(name: str | None = None, past: tuple[DeployedDevice, ...] = ()) -> Part:
    """The deployment that is called so, or the latest; `past` are the devices of one that is not the latest."""
    devices_of_it = list(past)

    def content(picture: Picture) -> list[Row]:
        record = _record(picture, name)
        if record is None:
            return []
        if record == picture.deployments[0]:  # and perhaps the next time no more
            devices_of_it[:] = picture.deployed
        return _rows(picture, devices_of_it)

    with ui.element("section").classes("card") as card:
        with ui.element("div").classes("standing"):
            with ui.element("h2"):
                title = ui.label()
            state, about = badge(), ui.label().classes("faint")
        with ui.element("ol").classes("steps-of") as way:
            steps = {step: ui.element("li") for step in deployment_rows.STEPS}
            for step, item in steps.items():
                with item:
                    ui.label(deployment_rows.DEPLOYMENT_WORDS[step][0])
        reason = ui.label().classes("trouble")
    devices = table(
        "Devices",
        deployment_rows.ROLLOUT,
        content,
        nothing="No such deployment." if name is not None else "No device was asked.",
        lanes=True,
    )

    def show(picture: Picture) -> None:
        record = _record(picture, name)
        see(card, record is not None)
        if record is not None:
            say(title, record.version)
            state(*deployment_rows.DEPLOYMENT_WORDS[record.state])
            ended = "" if record.ended_at is None else f", ended {time_text(record.ended_at)}"
            say(about, f"{record.deployment}, begun {time_text(record.started_at)}{ended}")
            say(reason, record.reason)
            see(reason, bool(record.reason))
            see(way, record.state in steps)
            for step, item in steps.items():
                _mark(item, deployment_rows.step_state(step, record.state))
        devices(picture)

    return show


def _mark(item: ui.element, mark: str) -> None:
    """`done`, `now`, or nothing for what is still to come or will not."""
    if item.classes != ([mark] if mark else []):
        item.classes(replace=mark)
        item.props("aria-current=step" if mark == "now" else "", remove="" if mark == "now" else "aria-current")


def _record(picture: Picture, name: str | None) -> DeploymentRecord | None:
    if name is None:
        return picture.deployments[0] if picture.deployments else None
    return next((one for one in picture.deployments if one.deployment == name), None)


def _rows(picture: Picture, devices: Sequence[DeployedDevice]) -> list[Row]:
    overview = picture.overview
    metric = "accuracy" if overview is None else overview.metric
    return deployment_rows.rollout(devices, metric=metric)
