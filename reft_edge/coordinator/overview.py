"""How a run stands and what each device does in it, made from the run's events and the store.

One value object behind `reft-edge status`, `devices` and their `--json`, and behind the dashboard; pure, so that what a
person sees and what a program reads cannot disagree.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec

from reft_edge.coordinator.events import DeviceProgress, DeviceSeen, Event, Planned, PlannedDevice, UpdateSeen
from reft_edge.coordinator.records import DeviceRecord, QuarantineRecord, RunRecord, RunState
from reft_edge.coordinator.report.live import DeviceView, FleetView
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire.messages import Measured


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a device has, and what its variant takes of it. None: not known, or nothing was ever trained."""

    flops_per_s: float | None = None
    """While it trains: as measured there and announced, or as planned with where nobody measured."""
    used_flops_per_s: float | None = None
    """Operations of its training steps over the time that they took; by the plan before the first update."""
    memory_bytes: float | None = None
    """That a training worker can have."""
    used_memory_bytes: float | None = None
    """Peak of its worker in the latest round; by the plan before the first update."""
    measured: bool = False
    """Whether the used figures are measured ones."""


class DeviceOverview(msgspec.Struct, frozen=True, kw_only=True):
    """One device as the coordinator knows it. What is not known is None, or empty."""

    device: str
    state: str
    """waiting, ready, offline, absent (offline, and its update is waited for), left out, asked, accepted, fetching,
    training, uploading, done (its update is here), merged, refused, failed, late, rejected, damaged or quarantine."""
    part: str = ""
    """What became of its task in the present round, or the last, whether it is there now or not. Empty: it had none."""
    online: bool | None = None
    reason: str = ""
    """Why it is in quarantine, or what it or the coordinator last said was wrong."""
    profile: str = ""
    """The kind of device."""
    training_samples: int = 0
    capacity: Capacity = Capacity()
    variant: str = ""
    share: float | None = None
    """Parameters of its variant over the unpruned model's."""
    steps_done: int = 0
    steps_total: int = 0
    loss: float | None = None
    predicted_s: float | None = None
    """Download, start and training in the latest round; `measured_s` is what they took."""
    measured_s: float | None = None
    expected_at: float | None = None
    """Unix seconds when its update should be here by the plan."""
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
    deadline: float | None = None
    """Unix seconds until when updates are waited for; None while none are."""
    metric: str
    """accuracy or mse."""
    values: list[float | None]
    """The metric at the end of each round."""
    devices: list[DeviceOverview]


def overview(
    events: Iterable[Event],
    *,
    record: RunRecord,
    at_work: bool,
    devices: Iterable[DeviceRecord] = (),
    quarantined: Iterable[QuarantineRecord] = (),
) -> RunOverview:
    """How the run of `record` stands after `events`; `devices` and `quarantined` are the store's."""
    tally = Tally()
    for event in events:
        tally.add(event)
    return tally.overview(record=record, at_work=at_work, devices=devices, quarantined=quarantined)


class Tally:
    """The events of a run so far, taken in one by one. Memory grows with devices, not with events."""

    def __init__(self) -> None:
        self._view = FleetView()
        self._told: dict[str, _Told] = defaultdict(_Told)

    def add(self, event: Event) -> None:
        self._view.apply(event)
        if isinstance(event, Planned):
            for plan in event.devices:
                told = self._told[plan.device]
                told.plan, told.plan_took = plan, None
        device = getattr(event, "device", None)
        if device is not None:
            self._told[device].add(event)

    def overview(
        self,
        *,
        record: RunRecord,
        at_work: bool,
        devices: Iterable[DeviceRecord] = (),
        quarantined: Iterable[QuarantineRecord] = (),
    ) -> RunOverview:
        """As the function of this name."""
        view = self._view
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
            deadline=view.deadline if at_work else None,
            metric=view.metric,
            values=list(view.values),
            devices=[
                _device(
                    view.devices.get(name, DeviceView(device=name)),
                    known.get(name),
                    barred.get(name),
                    self._told.get(name, _Told()),
                )
                for name in names
            ],
        )


@dataclass
class _Told:
    """What events have said about one device, beside its part in the round."""

    profile: str = ""
    complaint: str = ""
    """What was wrong in its latest task; empty when nothing was."""
    plan: PlannedDevice | None = None
    """The latest, and what it took; None until its update is here."""
    plan_took: Measured | None = None
    took: Measured | None = None
    """The latest task that is done."""
    updates: Counter[str] = field(default_factory=Counter)
    at: float | None = None

    def add(self, event: Event) -> None:
        if event.at is not None:
            self.at = event.at if self.at is None else max(self.at, event.at)
        match event:
            case DeviceSeen():
                self.profile = event.profile or self.profile
            case DeviceProgress():
                self.complaint = event.reason
            case UpdateSeen():
                self.complaint = event.reason
                self.took = event.measured or self.took
                if event.state == "received":
                    self.plan_took = event.measured
                if event.state != "duplicate":
                    self.updates[event.state] += 1


def _phase(view: FleetView, record: RunRecord, at_work: bool) -> str:
    """What is being done now."""
    if record.state != "active":
        return record.state
    return view.phase if at_work else "interrupted: the coordinator is not running"


def _device(row: DeviceView, record: DeviceRecord | None, barred: str | None, told: _Told) -> DeviceOverview:
    announced = record.announcement if record is not None else None
    times = [at for at in (told.at, record.seen_at if record is not None else None) if at is not None]
    return DeviceOverview(
        device=row.device,
        state="quarantine" if barred is not None else replace(row, quarantined=False).state,
        part=row.part,
        online=row.online,
        reason=barred if barred is not None else row.reason or told.complaint,
        profile=announced.profile.name if announced is not None else told.profile,
        training_samples=announced.training_samples if announced is not None else 0,
        capacity=_capacity(None if announced is None else announced.profile, told),
        variant=row.variant,
        share=row.share if row.variant else None,
        steps_done=row.steps_done,
        steps_total=row.steps_total,
        loss=row.loss,
        predicted_s=row.predicted_s,
        measured_s=row.measured_s,
        expected_at=row.expected_at,
        temperature_celsius=told.took.temperature_celsius if told.took is not None else None,
        throttled=told.took.throttled if told.took is not None else None,
        updates=dict(sorted(told.updates.items())),
        seen_at=max(times, default=None),
    )


def _capacity(profile: DeviceProfile | None, told: _Told) -> Capacity:
    plan, took = told.plan, told.plan_took
    training_s = memory_bytes = 0.0
    if took is not None:
        training_s, memory_bytes = took.training_s, took.peak_memory_bytes
    elif plan is not None:
        training_s, memory_bytes = plan.prediction.training_s, plan.prediction.peak_memory_bytes
    return Capacity(
        flops_per_s=None if profile is None else profile.planning_flops_per_s,
        used_flops_per_s=(plan.training_flops / training_s or None) if plan is not None and training_s else None,
        memory_bytes=None if profile is None else profile.planning_memory_bytes,
        used_memory_bytes=memory_bytes or None,
        measured=took is not None,
    )
