"""How a run stands and what each device does in it, made from the run's events and the store.

One value object behind `reft-edge status`, `devices` and their `--json`; pure, so that what a person sees and what a
program reads cannot disagree.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from reft_edge.coordinator.events import DeviceProgress, DeviceSeen, Event, UpdateSeen
from reft_edge.coordinator.records import DeviceRecord, QuarantineRecord, RunRecord, RunState
from reft_edge.coordinator.report.live import DeviceView, FleetView


class DeviceOverview(msgspec.Struct, frozen=True, kw_only=True):
    """One device as the coordinator knows it. What is not known is None, or empty."""

    device: str
    state: str
    """waiting, ready, offline, left out, asked, accepted, fetching, training, uploading, done, refused, failed, late,
    rejected, damaged or quarantine."""
    reason: str = ""
    """Why it is in quarantine, or what it or the coordinator last said was wrong."""
    profile: str = ""
    """The kind of device."""
    training_samples: int = 0
    variant: str = ""
    share: float | None = None
    """Parameters of its variant over the unpruned model's."""
    steps_done: int = 0
    steps_total: int = 0
    loss: float | None = None
    predicted_s: float | None = None
    """Download, start and training in the latest round; `measured_s` is what they took."""
    measured_s: float | None = None
    temperature_celsius: float | None = None
    throttled: bool | None = None
    updates: dict[str, int] = {}
    """Number of its updates in this run by what became of them."""
    seen_at: float | None = None
    """Unix seconds of the last that was heard of it."""

    @property
    def counted(self) -> int:
        """Updates of this run that are in the global model, or will be."""
        return self.updates.get("received", 0)

    @property
    def announced(self) -> int:
        return sum(self.updates.values())


class RunOverview(msgspec.Struct, frozen=True, kw_only=True):
    """A run, and everybody in it."""

    federation: str
    run: str
    state: RunState
    reason: str
    """Why it failed."""
    at_work: bool
    """Whether a coordinator works on the federation now."""
    created_at: float
    ended_at: float | None
    round: int
    rounds: int
    phase: str
    metric: str
    """accuracy or mse."""
    values: list[float | None]
    """The metric at the end of each round."""
    devices: list[DeviceOverview]


def overview(
    events: Sequence[Event],
    *,
    record: RunRecord,
    at_work: bool,
    devices: Iterable[DeviceRecord] = (),
    quarantined: Iterable[QuarantineRecord] = (),
) -> RunOverview:
    """How the run of `record` stands after `events`; `devices` and `quarantined` are the store's."""
    view = FleetView()
    said: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        view.apply(event)
        if (device := getattr(event, "device", None)) is not None:
            said[device].append(event)
    known = {one.device: one for one in devices}
    barred = {one.device: one.reason for one in quarantined}
    names = sorted(view.devices.keys() | known.keys())
    return RunOverview(
        federation=record.federation,
        run=record.run,
        state=record.state,
        reason=record.reason,
        at_work=at_work,
        created_at=record.created_at,
        ended_at=record.ended_at,
        round=view.round,
        rounds=view.rounds,
        phase=_phase(view, record, at_work),
        metric=view.metric,
        values=view.values,
        devices=[
            _device(name, view.devices.get(name), known.get(name), barred.get(name), said[name]) for name in names
        ],
    )


def _phase(view: FleetView, record: RunRecord, at_work: bool) -> str:
    """What is being done now."""
    if record.state != "active":
        return record.state
    return view.phase if at_work else "interrupted: the coordinator is not running"


def _device(
    name: str, row: DeviceView | None, record: DeviceRecord | None, barred: str | None, own: Sequence[Event]
) -> DeviceOverview:
    """`own` are the events about this device."""
    updates = [one for one in own if isinstance(one, UpdateSeen)]
    took = next((one.measured for one in reversed(updates) if one.measured is not None), None)
    times = [one.at for one in own if one.at is not None] + ([record.seen_at] if record is not None else [])
    row = row or DeviceView(device=name)
    announced = record.announcement if record is not None else None
    return DeviceOverview(
        device=name,
        state="quarantine" if barred is not None else row.state,
        reason=barred if barred is not None else _complaint(own),
        profile=announced.profile.name if announced is not None else _told_profile(own),
        training_samples=announced.training_samples if announced is not None else 0,
        variant=row.variant,
        share=row.share if row.variant else None,
        steps_done=row.steps_done,
        steps_total=row.steps_total,
        loss=row.loss,
        predicted_s=row.predicted_s,
        measured_s=row.measured_s,
        temperature_celsius=took.temperature_celsius if took is not None else None,
        throttled=took.throttled if took is not None else None,
        updates=dict(sorted(Counter(one.state for one in updates if one.state != "duplicate").items())),
        seen_at=max(times, default=None),
    )


def _complaint(own: Sequence[Event]) -> str:
    """What was wrong in the device's latest task; empty when nothing was."""
    for event in reversed(own):
        if isinstance(event, DeviceProgress | UpdateSeen):
            return event.reason
    return ""


def _told_profile(own: Sequence[Event]) -> str:
    return next((one.profile for one in reversed(own) if isinstance(one, DeviceSeen) and one.profile), "")
