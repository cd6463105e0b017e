"""`RunReport`: the figures of one run, gathered from the coordinator's events.

One value object is behind every view: `report.json` is this object, the HTML page and the terminal's table are made
from it, so they cannot disagree. Gathering is a pure function; nothing is measured or read from disk here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from reft_edge.coordinator.events import (
    DeviceSeen,
    Event,
    Exported,
    Finished,
    Planned,
    Quarantined,
    RoundClosed,
    RoundDistilled,
    RoundMerged,
    Started,
    UpdateSeen,
)
from reft_edge.coordinator.records import DeployedDevice

SCHEMA = 1


class RoundFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The global model through one round; the metric is `RunReport.metric`, None where nothing was evaluated."""

    round: int
    averaged: float | None = None
    """Straight after the weighted mean."""
    merged: float | None = None
    """After the mean and, on public data, new batch-norm statistics."""
    distilled: float | None = None
    """After distillation; None where there was none."""
    kept_epoch: int | None = None
    """Epoch of the distillation that was kept; 0 means that the merged model was."""
    updates: int = 0
    asked: int = 0
    seconds: float = 0.0


class DeviceRound(msgspec.Struct, frozen=True, kw_only=True):
    """One device in one round: planned against measured. Times in seconds, None until measured."""

    round: int
    variant: str
    ratio: float
    state: str = "missing"
    """The update's fate: received, late, rejected, duplicate, damaged; or missing."""
    predicted_training_s: float
    measured_training_s: float | None = None
    predicted_s: float
    """Download, start and training; uploads wait for their turn, so they are not compared."""
    measured_s: float | None = None
    predicted_memory_bytes: float = 0.0
    measured_memory_bytes: int | None = None
    """Peak resident memory of the worker."""
    down_bytes: int = 0
    up_bytes: int = 0
    steps: int = 0
    loss: float | None = None
    """Mean training loss of the last local epoch."""


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One device over the run."""

    device: str
    profile: str
    training_samples: int
    share: float
    """Parameters of its last variant over the unpruned model's."""
    parameters: int
    forward_macs: int
    rounds: list[DeviceRound]

    @property
    def ratio(self) -> float:
        return self.rounds[-1].ratio if self.rounds else 0.0

    @property
    def variant(self) -> str:
        return self.rounds[-1].variant if self.rounds else ""

    @property
    def down_bytes(self) -> int:
        return sum(one.down_bytes for one in self.rounds)

    @property
    def up_bytes(self) -> int:
        return sum(one.up_bytes for one in self.rounds)

    @property
    def updates(self) -> int:
        return sum(one.state == "received" for one in self.rounds)


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was there and got no task in a round, and why."""

    device: str
    round: int
    reason: str


class RejectedUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """An update that was of no use, and why."""

    device: str
    round: int
    reason: str
    up_bytes: int
    kept: str = ""
    """Path of the note beside it; empty if it was not kept."""


class QuarantinedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was put into quarantine in this run, and why."""

    device: str
    reason: str


class CentralFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The same net trained on the pooled private data, which a federation must do without."""

    value: float
    """In the report's metric, on the same test data."""
    epochs: int
    samples: int
    seconds: float


class ExportFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One exported file: `values` holds `bytes` and what it scores."""

    name: str
    path: str
    values: dict[str, float]


class DeployedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a device made of the run's models when they were deployed to it."""

    device: str
    model: str
    precision: str = ""
    """Of the file that it took."""
    value: float | None = None
    """In the report's metric, on the device's own held-out samples; of the file that it took."""
    holdout_samples: int = 0
    state: str
    reason: str = ""


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a report shows."""

    run: str
    federation: str
    model: str
    parameters: int
    full_model_bytes: int
    """The unpruned model in float32: what plain federated averaging sends, each way, each round."""
    metric: Literal["accuracy", "mse"]
    value: float | None
    """The metric of the final model on test data."""
    rounds: list[RoundFigures]
    devices: list[DeviceFigures]
    left_out: list[LeftOut] = []
    rejected: list[RejectedUpdate] = []
    quarantined: list[QuarantinedDevice] = []
    exports: list[ExportFigures] = []
    deployed: list[DeployedFigures] = []
    """Where the one who started the run deployed it, too."""
    central: CentralFigures | None = None
    finished: bool = False
    seconds: float | None = None
    """Wall time of everything, where the one who started it measured it."""
    setting: dict[str, str] = {}
    """What else a reader should know, for example the data and how it was divided."""
    schema: int = SCHEMA

    @property
    def unpruned_bytes(self) -> int:
        """What each device would have carried each way, unpruned in float32, over the closed rounds."""
        return self.full_model_bytes * len(self.rounds)


def gather(
    events: Iterable[Event],
    *,
    deployed: Iterable[DeployedDevice] = (),
    central: CentralFigures | None = None,
    seconds: float | None = None,
    setting: dict[str, str] | None = None,
) -> RunReport:
    """The report of the run that `events` tell of; a run that has not ended gives what is known so far."""
    told = list(events)
    started = next((event for event in told if isinstance(event, Started)), None)
    finished = next((event for event in reversed(told) if isinstance(event, Finished)), None)
    regression = any(isinstance(e, RoundMerged | RoundClosed) and e.mse is not None for e in told)
    metric: Literal["accuracy", "mse"] = "mse" if regression else "accuracy"
    rounds = _rounds(told, metric)
    last = next(
        (v for one in reversed(rounds) for v in (one.distilled, one.merged, one.averaged) if v is not None), None
    )
    final = getattr(finished, metric) if finished is not None else None
    return RunReport(
        run=started.run if started else "",
        federation=started.federation if started else "",
        model=started.model if started else "",
        parameters=started.parameters if started else 0,
        full_model_bytes=started.global_bytes if started else 0,
        metric=metric,
        value=final if final is not None else last,
        rounds=rounds,
        devices=_devices(told),
        left_out=[
            LeftOut(device=one.device, round=event.round, reason=one.reason)
            for event in told
            if isinstance(event, Planned)
            for one in event.excluded
        ],
        rejected=[
            RejectedUpdate(device=e.device, round=e.round, reason=e.reason, up_bytes=e.up_bytes, kept=e.kept)
            for e in told
            if isinstance(e, UpdateSeen) and e.state == "rejected"
        ],
        quarantined=[QuarantinedDevice(device=e.device, reason=e.reason) for e in told if isinstance(e, Quarantined)],
        exports=[ExportFigures(name=e.name, path=e.path, values=e.values) for e in told if isinstance(e, Exported)],
        deployed=[_deployed(one) for one in deployed],
        central=central,
        finished=finished is not None,
        seconds=seconds,
        setting=setting or {},
    )


def to_json(report: RunReport) -> bytes:
    """Readable JSON, the same bytes for equal reports."""
    return msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=2)


def _deployed(part: DeployedDevice) -> DeployedFigures:
    health = part.measured
    return DeployedFigures(
        device=part.device,
        model=part.model,
        precision=part.precision or "",
        value=None if health is None else health.metric,
        holdout_samples=0 if health is None else health.holdout_samples,
        state=part.state,
        reason=part.reason,
    )


def _rounds(events: list[Event], metric: Literal["accuracy", "mse"]) -> list[RoundFigures]:
    found: dict[int, dict[str, object]] = {}
    for event in events:
        match event:
            case RoundMerged():
                averaged = event.accuracy_before_batch_norm if metric == "accuracy" else None
                found[event.round] = {"averaged": averaged, "merged": getattr(event, metric)}
            case RoundDistilled():
                figures = {"distilled": getattr(event, metric), "kept_epoch": event.kept_epoch}
                found.setdefault(event.round, {}).update(figures)
            case RoundClosed():
                figures = {"updates": event.counted, "asked": event.asked, "seconds": event.seconds}
                found.setdefault(event.round, {}).update(figures)
    return [msgspec.convert({"round": number, **figures}, RoundFigures) for number, figures in sorted(found.items())]


def _devices(events: list[Event]) -> list[DeviceFigures]:
    """By device name; a round that was planned again counts with its last plan."""
    seen = {event.device: event for event in events if isinstance(event, DeviceSeen) and event.profile}
    rounds: dict[str, dict[int, DeviceRound]] = {}
    latest: dict[str, dict[str, float]] = {}
    for event in events:
        match event:
            case Planned():
                for plan in event.devices:
                    predicted = plan.prediction
                    rounds.setdefault(plan.device, {})[event.round] = DeviceRound(
                        round=event.round,
                        variant=plan.variant,
                        ratio=plan.ratio,
                        predicted_training_s=predicted.training_s,
                        predicted_s=predicted.download_s + predicted.start_s + predicted.training_s,
                        predicted_memory_bytes=predicted.peak_memory_bytes,
                    )
                    latest[plan.device] = {
                        "share": plan.share,
                        "parameters": plan.parameters,
                        "forward_macs": plan.forward_macs,
                    }
            case UpdateSeen():
                _amend(rounds, event.device, event.round, _measured(event))
            case RoundClosed():
                for bytes_ in event.traffic:
                    traffic = {"down_bytes": bytes_.down_bytes, "up_bytes": bytes_.up_bytes}
                    _amend(rounds, bytes_.device, event.round, traffic)
    return [
        DeviceFigures(
            device=name,
            profile=seen[name].profile if name in seen else "",
            training_samples=seen[name].training_samples if name in seen else 0,
            share=latest[name]["share"],
            parameters=int(latest[name]["parameters"]),
            forward_macs=int(latest[name]["forward_macs"]),
            rounds=[one for _, one in sorted(rounds[name].items())],
        )
        for name in sorted(rounds)
    ]


def _measured(event: UpdateSeen) -> dict[str, object]:
    found: dict[str, object] = {"state": event.state, "loss": event.loss_last}
    if event.measured is not None and event.state != "rejected":
        took = event.measured
        found["measured_training_s"] = took.training_s
        found["measured_s"] = took.download_s + took.start_s + took.training_s
        found["measured_memory_bytes"] = took.peak_memory_bytes
        found["steps"] = took.steps
    return found


def _amend(rounds: dict[str, dict[int, DeviceRound]], device: str, number: int, figures: Mapping[str, object]) -> None:
    """Add what became known of a planned device-round; what nobody planned, nor a duplicate, changes nothing."""
    planned = rounds.get(device, {}).get(number)
    if planned is None or figures.get("state") == "duplicate":
        return
    rounds[device][number] = msgspec.structs.replace(planned, **figures)
