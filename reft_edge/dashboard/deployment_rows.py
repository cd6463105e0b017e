"""Rows of the pages about deployments and predictions. Pure; what is said in `rows` about rows holds here."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from reft_edge.coordinator.report.figures import bytes_text, metric_text, seconds_text
from reft_edge.coordinator.report.times import time_text
from reft_edge.dashboard.rows import Row, Tone, columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reft_edge.coordinator.drift import Departure
    from reft_edge.coordinator.overview import DeviceOverview
    from reft_edge.coordinator.records import (
        ConditionRecord,
        DeployedDevice,
        DeployedState,
        DeploymentRecord,
        DeploymentState,
    )

STEPS: tuple[DeploymentState, ...] = ("canary", "soaking", "rolling_out", "done")
"""Of a deployment that goes well."""

DEPLOYMENT_WORDS: Mapping[DeploymentState, tuple[str, Tone]] = {
    "canary": ("canary", "busy"),
    "soaking": ("soaking", "busy"),
    "rolling_out": ("rolling out", "busy"),
    "done": ("done", "good"),
    "rolling_back": ("rolling back", "warn"),
    "rolled_back": ("rolled back", "bad"),
    "interrupted": ("interrupted", "warn"),
}

DEVICE_WORDS: Mapping[DeployedState, tuple[str, Tone]] = {
    "waiting": ("waiting", "quiet"),
    "asked": ("asked", "busy"),
    "fetching": ("fetching", "busy"),
    "checking": ("checking", "busy"),
    "serving": ("serving", "good"),
    "refused": ("refused", "bad"),
    "failed": ("failed", "bad"),
    "late": ("late", "warn"),
    "away": ("away", "warn"),
    "rolled_back": ("rolled back", "warn"),
}
"""In the order in which a device goes through them."""

_PLACES = {state: place for place, state in enumerate(DEVICE_WORDS)}

DEPLOYMENTS = columns(
    {"deployment": "link", "state": "state", "started": "time", "took": "number"},
    deployment="deployment",
    state="state",
    version="version",
    started="begun",
    took="took",
    reason="why",
)


def deployments(records: Sequence[DeploymentRecord]) -> list[Row]:
    """All of the federation, the latest first."""
    return [
        {
            "key": one.deployment,
            "deployment": one.deployment,
            "href": f"/deployments/{one.deployment}",
            "state": DEPLOYMENT_WORDS[one.state][0],
            "tone": DEPLOYMENT_WORDS[one.state][1],
            "version": one.version,
            "started": time_text(one.started_at),
            "took": "-" if one.ended_at is None else seconds_text(one.ended_at - one.started_at),
            "reason": one.reason,
        }
        for one in records
    ]


ROLLOUT = columns(
    {"state": "state", "before": "number", "after": "number", "p95": "number", "memory": "number", "took": "number"},
    device="device",
    state="state",
    wave="wave",
    model="model",
    precision="precision",
    before="before",
    after="on its holdout",
    p95="p95 of a sample",
    memory="memory",
    took="took",
    reason="why",
)


def step_state(step: DeploymentState, state: DeploymentState) -> str:
    """Of a step of a deployment that is in `state`: `done`, `now`, or empty."""
    if state not in STEPS:
        return ""
    place, now = STEPS.index(step), STEPS.index(state)
    return "done" if place < now or state == "done" else "now" if place == now else ""


def rollout(devices: Sequence[DeployedDevice], *, metric: str) -> list[Row]:
    """One for each device of a deployment."""
    return [
        {
            "key": one.device,
            "device": one.device,
            "state": DEVICE_WORDS[one.state][0],
            "tone": DEVICE_WORDS[one.state][1],
            "lane": DEVICE_WORDS[one.state][0],
            "place": _PLACES[one.state],
            "wave": one.wave,
            "model": one.model,
            "model_more": one.why,
            **_measured(one, metric),
            "took": _span(one.asked_at, one.answered_at),
            "reason": one.reason,
        }
        for one in devices
    ]


def _measured(one: DeployedDevice, metric: str) -> Row:
    """What the device found, of the file that it took; of the better one where it took none."""
    found = one.measured
    if found is None:
        return {"precision": one.precision or "-", "before": "-", "after": "-", "p95": "-", "memory": "-"}
    return {
        "precision": found.precision if one.precision is not None else f"{found.precision}, not taken",
        "before": metric_text(found.metric_before, metric),
        "after": metric_text(found.metric, metric),
        "p95": milliseconds_text(found.latency_p95_s),
        "memory": bytes_text(found.peak_memory_bytes),
    }


SERVED = columns({"devices": "number"}, version="version", model="model", precision="precision", devices="devices")


def served(devices: Sequence[DeviceOverview]) -> list[Row]:
    """What is served now, by how many; what most serve first."""
    counts = Counter((one.serving.version, one.serving.model, one.serving.precision) for one in devices if one.serving)
    return [
        {
            "key": "/".join(what),
            "version": what[0],
            "model": what[1],
            "precision": what[2],
            "devices": count,
        }
        for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


PREDICTING = columns(
    {
        "device": "link",
        "departs": "mark",
        "distance": "number",
        "predictions": "number",
        "errors": "number",
        "p95": "number",
        "seen": "age",
    },
    device="device",
    departs="departs in",
    version="version",
    distance="distance",
    predictions="predictions",
    errors="errors",
    p95="p95 of a request",
    seen="told",
    reason="how",
)


def predicting(conditions: Sequence[ConditionRecord], departing: Sequence[Departure]) -> list[Row]:
    """Devices that tell counts of what they predict, those that depart from the rest first."""
    odd: dict[str, list[Departure]] = {}
    for departure in departing:
        odd.setdefault(departure.device, []).append(departure)
    told = [(one, one.condition.counts) for one in conditions if one.condition.counts is not None]
    found: list[Row] = [
        {
            "key": one.device,
            "device": one.device,
            "href": f"/drift/{one.device}",
            "departs": ", ".join(each.aspect for each in odd.get(one.device, [])),
            "version": counts.version,
            "distance": max((f"{each.distance:.2f}" for each in odd.get(one.device, [])), default="-"),
            "predictions": counts.predictions or None,  # errors are told by all, predictions where the owner allows it
            "errors": counts.errors,
            "p95": milliseconds_text(counts.latency_p95_s),
            "seen": one.seen_at,
            "reason": "; ".join(each.reason for each in odd.get(one.device, [])),
        }
        for one, counts in told
    ]
    return sorted(found, key=lambda row: (not row["departs"], str(row["key"])))


def milliseconds_text(seconds: float | None) -> str:
    """With three digits; a hyphen for what is unknown."""
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"


def _span(since: float | None, until: float | None) -> str:
    return "-" if since is None or until is None else seconds_text(max(0.0, until - since))
