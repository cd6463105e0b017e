"""Rows and columns of the pages' tables. Pure: value objects in, plain dictionaries out.

A row has a `key`, and a value for each of its table's columns; what stands small below column `name` is `name_more`.
Beside them perhaps a `tone` and a `mark` that warns and leads to `mark_href`, for the badges, and a `lane` and its
`place` where rows are counted by lane.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, TypeAlias

from reft_edge.coordinator.report.figures import bytes_text, metric_text, seconds_text
from reft_edge.coordinator.report.times import time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reft_edge.coordinator.overview import DeviceOverview, RunOverview
    from reft_edge.coordinator.records import QuarantineRecord
    from reft_edge.coordinator.report.record import RunReport

Value: TypeAlias = str | int | float | None
Row: TypeAlias = dict[str, Value]
Column: TypeAlias = dict[str, str]

Kind: TypeAlias = Literal["text", "number", "state", "mark", "progress", "age", "due", "link", "time"]
"""How a column shows its values: `number` is aligned and sorted as one, `mark` warns where it says anything, `age` and
`due` are Unix seconds behind us and before us, `link` leads to the row's `href`."""

Tone: TypeAlias = Literal["busy", "good", "warn", "bad", "quiet"]

LANES: dict[str, tuple[str, Tone]] = {
    "asked": ("waiting", "quiet"),
    "accepted": ("waiting", "quiet"),
    "fetching": ("fetching", "busy"),
    "training": ("training", "busy"),
    "uploading": ("uploading", "busy"),
    "done": ("received", "good"),
    "merged": ("merged", "good"),
    "late": ("late", "warn"),
    "rejected": ("rejected", "bad"),
    "damaged": ("damaged", "bad"),
    "failed": ("failed", "bad"),
    "refused": ("refused", "warn"),
    "absent": ("absent", "warn"),
    "left out": ("left out", "quiet"),
    "quarantine": ("quarantine", "bad"),
    "ready": ("ready", "good"),
    "offline": ("offline", "quiet"),
}
"""A device's state -> how the pages call it, and its tone, in the order in which a round goes. Words say what colours
say."""

_PLACES = {lane: place for place, (lane, _) in enumerate(LANES.values())}

FINISHED = ("uploading", "done", "merged", "late", "rejected", "damaged")
"""Parts of devices of whose steps nothing more is heard."""


def columns(kinds: Mapping[str, Kind] | None = None, **headings: str) -> list[Column]:
    """A column for each field."""
    known = kinds or {}
    return [{"name": name, "label": label, "kind": known.get(name, "text")} for name, label in headings.items()]


FLEET = columns(
    {
        "state": "state",
        "speed": "number",
        "memory": "number",
        "temperature": "number",
        "battery": "number",
        "updates": "number",
        "seen": "age",
    },
    device="device",
    state="state",
    variant="trains",
    speed="FLOP/s used",
    memory="memory used",
    served="serves",
    temperature="temperature",
    battery="power",
    updates="updates",
    seen="last seen",
)


def fleet(devices: Sequence[DeviceOverview]) -> list[Row]:
    """What each device is, what it has and uses, and how it is."""
    return [
        {
            "key": one.device,
            "device": one.device,
            "device_more": one.profile,
            **_lane(one.state),
            "mark": "predicts unlike the rest" if one.departs else "",
            "mark_href": f"/drift/{one.device}",
            "variant": _share(one),
            "speed": _of(one.capacity.used_flops_per_s, one.capacity.flops_per_s, flops_text, one.capacity.measured),
            "memory": _of(one.capacity.used_memory_bytes, one.capacity.memory_bytes, bytes_text, one.capacity.measured),
            "served": "-" if one.serving is None else one.serving.version,
            "served_more": "" if one.serving is None else f"{one.serving.model}, {one.serving.precision}",
            "temperature": _temperature(one),
            "battery": _power(one),
            "updates": f"{one.counted} of {one.announced}",
            "updates_more": f"{one.training_samples} samples" if one.training_samples else "",
            "seen": one.seen_at,
        }
        for one in devices
    ]


ROUND = columns(
    {"state": "state", "progress": "progress", "due": "due", "loss": "number", "took": "number"},
    device="device",
    state="where",
    progress="steps",
    loss="loss",
    variant="model",
    due="expected",
    took="took",
    reason="why",
)


def present_round(state: RunOverview) -> list[Row]:
    """Who is where in the round that is open, or was the last; those who have no part in it, too."""
    return [
        {
            "key": one.device,
            "device": one.device,
            **_lane(place),
            "progress": _progress(one),
            "steps": f"{one.steps_done} of {one.steps_total}" if one.steps_total else "",
            "loss": "-" if one.loss is None else f"{one.loss:.3f}",
            "variant": _share(one),
            "due": one.expected_at if state.at_work and place in EXPECTED else None,
            "took": seconds_text(one.measured_s),
            "reason": one.reason,
        }
        for one in state.devices
        for place in [_place(one)]
    ]


EXPECTED = ("asked", "accepted", "fetching", "training", "uploading", "absent")
"""Where devices are from which the round still expects something."""


def _place(one: DeviceOverview) -> str:
    """Its part, which it keeps when it leaves after it has done it."""
    return one.part if one.part and one.state in ("offline", one.part) else one.state


ROUNDS = columns(
    dict.fromkeys(("round", "averaged", "merged", "distilled", "traffic", "time"), "number"),
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
    traffic: dict[int, int] = {}
    for device in report.devices:
        for part in device.rounds:
            traffic[part.round] = traffic.get(part.round, 0) + part.down_bytes + part.up_bytes
    return [
        {
            "key": str(one.round),
            "round": one.round,
            "averaged": metric_text(one.averaged, report.metric),
            "merged": metric_text(one.merged, report.metric),
            "distilled": metric_text(one.distilled, report.metric),
            "updates": f"{one.updates} of {one.asked}",
            "traffic": bytes_text(traffic.get(one.round, 0)),
            "time": seconds_text(one.seconds),
        }
        for one in reversed(report.rounds)
    ]


EXPORTS = columns({"size": "number", "value": "number"}, name="file", size="size", value="on test data", path="where")


def exports(report: RunReport) -> list[Row]:
    """Exported models."""
    return [
        {
            "key": one.name,
            "name": f"{one.name}.onnx",
            "size": bytes_text(one.values.get("size_bytes", 0)),
            "value": metric_text(one.values.get(report.metric), report.metric),
            "path": one.path,
        }
        for one in report.exports
    ]


REJECTED = columns(
    {"round": "number", "size": "number"}, device="device", round="round", reason="why", size="size", kept="kept as"
)


def rejected(report: RunReport) -> list[Row]:
    """Updates of no use, the newest first."""
    return [
        {
            "key": str(number),
            "device": one.device,
            "round": one.round,
            "reason": one.reason,
            "size": bytes_text(one.up_bytes),
            "kept": one.kept or "-",
        }
        for number, one in reversed(list(enumerate(report.rejected)))
    ]


QUARANTINED = columns({"since": "time"}, device="device", since="since", author="by", reason="why")


def quarantined(records: Sequence[QuarantineRecord]) -> list[Row]:
    """Devices that get no tasks."""
    return [
        {
            "key": one.device,
            "device": one.device,
            "since": time_text(one.since),
            "author": "the coordinator" if one.by == "rejections" else "a person",
            "reason": one.reason,
        }
        for one in records
    ]


LEFT_OUT = columns({"round": "number"}, device="device", round="round", reason="why")


def left_out(report: RunReport) -> list[Row]:
    """Devices that were there and got no task, the newest first."""
    return [
        {"key": str(number), "device": one.device, "round": one.round, "reason": one.reason}
        for number, one in reversed(list(enumerate(report.left_out)))
    ]


def clock_text(at: float) -> str:
    """Unix seconds as the time of day here."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def flops_text(flops_per_s: float) -> str:
    """With three digits."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops_per_s >= scale:
            return f"{flops_per_s / scale:.3g} {prefix}FLOP/s"
    return f"{flops_per_s:.3g} FLOP/s"


def _lane(state: str) -> Row:
    lane, tone = LANES.get(state, (state, "quiet"))
    return {"state": lane, "tone": tone, "lane": lane, "place": _PLACES.get(lane, len(_PLACES))}


def _of(used: float | None, there: float | None, text: Callable[[float], str], measured: bool) -> str:
    """What is used of what there is; a planned figure has a tilde."""
    if there is None:
        return "-"
    whole = text(there)
    if used is None:
        return f"of {whole}"
    part = text(used)
    if part.split()[-1] == whole.split()[-1]:
        part = part.split()[0]
    return f"{'' if measured else '~'}{part} of {whole}"


def _progress(one: DeviceOverview) -> float:
    """Share of the training steps that are done."""
    if one.steps_total:
        return round(one.steps_done / one.steps_total, 3)
    return 1.0 if one.part in FINISHED and one.measured_s is not None else 0.0


def _share(one: DeviceOverview) -> str:
    return "-" if one.share is None else f"{one.share:.0%}"


def _power(one: DeviceOverview) -> str:
    """Charge, and whether it is being used up."""
    if one.battery_share is None:
        return "-" if one.on_battery is None else "battery" if one.on_battery else "mains"
    return f"{one.battery_share:.0%}{' battery' if one.on_battery else ''}"


def _temperature(one: DeviceOverview) -> str:
    degrees = "-" if one.temperature_celsius is None else f"{one.temperature_celsius:.0f} °C"
    return f"{degrees}, throttled" if one.throttled else degrees
