"""Rows and columns of the pages' tables. Pure: value objects in, plain dictionaries out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reft_edge.coordinator.report.page import bytes_text, metric_text, seconds_text
from reft_edge.coordinator.report.times import age_text, time_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reft_edge.coordinator.overview import DeviceOverview
    from reft_edge.coordinator.records import QuarantineRecord
    from reft_edge.coordinator.report.record import RunReport

TRAINED = ("uploading", "done", "late", "rejected", "damaged")
"""States of devices that have finished their steps."""

STATE_COLOURS = {
    "training": "primary",
    "fetching": "primary",
    "uploading": "primary",
    "accepted": "primary",
    "asked": "primary",
    "done": "positive",
    "ready": "positive",
    "late": "warning",
    "left out": "warning",
    "offline": "grey",
    "waiting": "grey",
    "refused": "negative",
    "failed": "negative",
    "rejected": "negative",
    "damaged": "negative",
    "quarantine": "negative",
}
"""Colours of Quasar, the page's toolkit; words say the same, for those who do not see colours."""

Row = dict[str, Any]
Column = dict[str, Any]


def columns(**headings: str) -> list[Column]:
    """A column for each field; the first is the key by which rows stay apart."""
    return [
        {"name": field, "label": label, "field": field, "align": "left", "sortable": True}
        for field, label in headings.items()
    ]


FLEET = columns(
    device="device",
    state="state",
    kind="kind",
    model="model",
    samples="samples",
    updates="updates",
    planned="planned",
    took="took",
    temperature="temperature",
    heard="heard of",
)


def fleet(devices: Sequence[DeviceOverview], now: float) -> list[Row]:
    """What each device is, what it trains, and how it does. `now` in Unix seconds."""
    return [
        {
            "device": one.device,
            "state": one.state,
            "colour": STATE_COLOURS.get(one.state, "grey"),
            "kind": one.profile or "-",
            "model": _share(one),
            "samples": one.training_samples,
            "updates": f"{one.counted} of {one.announced}",
            "planned": seconds_text(one.predicted_s),
            "took": seconds_text(one.measured_s),
            "temperature": _temperature(one),
            "heard": "-" if one.seen_at is None else f"{age_text(one.seen_at, now)} ago",
        }
        for one in devices
    ]


ROUND = columns(device="device", state="state", progress="progress", model="model", loss="loss", reason="why")


def present_round(devices: Sequence[DeviceOverview]) -> list[Row]:
    """Who is where in the round that is open, or was the last."""
    return [
        {
            "device": one.device,
            "state": one.state,
            "colour": STATE_COLOURS.get(one.state, "grey"),
            "progress": _progress(one),
            "model": _share(one),
            "loss": "-" if one.loss is None else f"{one.loss:.3f}",
            "reason": one.reason,
        }
        for one in devices
        if one.variant or one.reason
    ]


ROUNDS = columns(
    round="round",
    averaged="mean",
    merged="merged",
    distilled="distilled",
    updates="updates",
    traffic="traffic",
    time="time",
)


def rounds(report: RunReport) -> list[Row]:
    """One for each round, the newest first."""
    return [
        {
            "round": one.round,
            "averaged": metric_text(one.averaged, report.metric),
            "merged": metric_text(one.merged, report.metric),
            "distilled": metric_text(one.distilled, report.metric),
            "updates": f"{one.updates} of {one.asked}",
            "traffic": bytes_text(
                sum(
                    part.down_bytes + part.up_bytes
                    for device in report.devices
                    for part in device.rounds
                    if part.round == one.round
                )
            ),
            "time": seconds_text(one.seconds),
        }
        for one in reversed(report.rounds)
    ]


EXPORTS = columns(name="file", size="size", value="on test data", path="where")


def exports(report: RunReport) -> list[Row]:
    """Exported models."""
    return [
        {
            "name": f"{one.name}.onnx",
            "size": bytes_text(one.values.get("size_bytes", 0)),
            "value": metric_text(one.values.get(report.metric), report.metric),
            "path": one.path,
        }
        for one in report.exports
    ]


REJECTED = columns(place="update", reason="why", size="size", kept="kept as")


def rejected(report: RunReport) -> list[Row]:
    """Updates of no use, the newest first."""
    return [
        {
            "place": f"{one.device}, round {one.round}",
            "reason": one.reason,
            "size": bytes_text(one.up_bytes),
            "kept": one.kept or "-",
        }
        for one in reversed(report.rejected)
    ]


QUARANTINED = columns(device="device", since="since", author="by", reason="why")


def quarantined(records: Sequence[QuarantineRecord]) -> list[Row]:
    """Devices that get no tasks."""
    return [
        {
            "device": one.device,
            "since": time_text(one.since),
            "author": "the coordinator" if one.by == "rejections" else "a person",
            "reason": one.reason,
        }
        for one in records
    ]


LEFT_OUT = columns(place="device", reason="why")


def left_out(report: RunReport) -> list[Row]:
    """Devices that were there and got no task, the newest first."""
    return [{"place": f"{one.device}, round {one.round}", "reason": one.reason} for one in reversed(report.left_out)]


def _progress(one: DeviceOverview) -> float:
    """Share of the training steps that are done."""
    if one.state in TRAINED:
        return 1.0
    return one.steps_done / one.steps_total if one.steps_total else 0.0


def _share(one: DeviceOverview) -> str:
    return "-" if one.share is None else f"{one.share:.0%}"


def _temperature(one: DeviceOverview) -> str:
    degrees = "-" if one.temperature_celsius is None else f"{one.temperature_celsius:.0f} °C"
    return f"{degrees}, throttled" if one.throttled else degrees
