"""How a run stands and what each device does in it, made from the run's events and the store.

One value object behind `reft-edge status`, `devices` and their `--json`, and behind the dashboard; pure, so that what a
person sees and what a program reads cannot disagree.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from reft_edge.coordinator.events import DeviceProgress, DeviceSeen, Event, Planned, PlannedDevice, UpdateSeen
from reft_edge.coordinator.records import DeploymentState, RunRecord, RunState
from reft_edge.coordinator.report.live import DeviceView, FleetView
from reft_edge.coordinator.run_files import FleetFiles, RunFiles
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire.deployment import Served, Vitals
from reft_edge.wire.messages import Measured

if TYPE_CHECKING:
    from reft_edge.coordinator.drift import Departure


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
    """As it was told last, between rounds or with an update; so is `throttled`."""
    throttled: bool | None = None
    battery_share: float | None = None
    """Charge, from 0 to 1."""
    on_battery: bool | None = None
    serving: Served | None = None
    """What it predicts with."""
    departs: list[str] = []
    """How its predictions are unlike those of the others that serve the same version, in words."""
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


class DeploymentOverview(msgspec.Struct, frozen=True, kw_only=True):
    """The latest roll-out of a version."""

    deployment: str
    version: str
    state: DeploymentState
    reason: str
    """Why it was rolled back or interrupted."""
    started_at: float
    ended_at: float | None
    devices: dict[str, int]
    """Number of devices by how far they are."""


class RunOverview(msgspec.Struct, frozen=True, kw_only=True):
    """A run, and everybody in it. Where models were deployed and none was trained, without a run."""

    federation: str
    run: str
    """Empty where there is none."""
    state: RunState | None
    reason: str
    """Why it failed."""
    at_work: bool
    """Whether a coordinator works on the federation now."""
    watched: bool
    """Whether it, a deployment or a monitor hears the devices now; if not, they are as they were heard last."""
    created_at: float | None
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
    deployment: DeploymentOverview | None = None


def overview(events: Iterable[Event], files: FleetFiles, *, departing: Sequence[Departure] = ()) -> RunOverview:
    """How the run of `files` stands after `events`."""
    tally = Tally()
    for event in events:
        tally.add(event)
    return tally.overview(files, departing=departing)


def served_text(served: Served | None) -> str:
    """Version and precision; the model, too, where it is not the whole one. A hyphen for nothing."""
    if served is None:
        return "-"
    model = "" if served.model == "global" else f"{served.model} "
    return f"{served.version} {model}{served.precision}"


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

    def overview(self, files: FleetFiles, *, departing: Sequence[Departure] = ()) -> RunOverview:
        """As the function of this name."""
        view = self._view
        record = files.record if isinstance(files, RunFiles) else None
        known = _Known(files, departing)
        return RunOverview(
            federation=files.federation,
            run=record.run if record is not None else "",
            state=record.state if record is not None else None,
            reason=record.reason if record is not None else "",
            at_work=files.at_work,
            watched=files.watched,
            created_at=record.created_at if record is not None else None,
            ended_at=record.ended_at if record is not None else None,
            round=view.round,
            rounds=view.rounds,
            phase=_phase(view, record, files.at_work),
            deadline=view.deadline if files.at_work else None,
            metric=view.metric,
            values=list(view.values),
            devices=[
                known.device(view.devices.get(name, DeviceView(device=name)), self._told.get(name, _Told()))
                for name in sorted(view.devices.keys() | known.names)
            ],
            deployment=_deployment(files),
        )


class _Known:
    """What the store knows of each device."""

    def __init__(self, files: FleetFiles, departing: Sequence[Departure]) -> None:
        self.devices = {one.device: one for one in files.devices}
        self.conditions = {one.device: one for one in files.conditions}
        self._barred = {one.device: one.reason for one in files.quarantined}
        self._presence = {one.device: one for one in files.presence}
        self._departs: dict[str, list[str]] = defaultdict(list)
        for one in departing:
            self._departs[one.device].append(one.reason)
        self.names = self.devices.keys() | self.conditions.keys() | self._presence.keys()

    def device(self, row: DeviceView, told: _Told) -> DeviceOverview:
        """Who is there is known from the store, where a process that began later than the events has put it."""
        name = row.device
        presence, record, condition = self._presence.get(name), self.devices.get(name), self.conditions.get(name)
        row = replace(row, quarantined=False, online=row.online if presence is None else presence.online)
        barred = self._barred.get(name)
        announced = record.announcement if record is not None else None
        vitals = condition.condition.vitals if condition is not None else None
        took = told.took
        times = [
            told.at,
            record.seen_at if record is not None else None,
            presence.at if presence is not None else None,
            condition.seen_at if condition is not None else None,
        ]
        if vitals is None and took is not None:
            vitals = Vitals(temperature_celsius=took.temperature_celsius, throttled=took.throttled)
        vitals = vitals or Vitals()
        return DeviceOverview(
            device=name,
            state="quarantine" if barred is not None else row.state,
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
            temperature_celsius=vitals.temperature_celsius,
            throttled=vitals.throttled,
            battery_share=vitals.battery_share,
            on_battery=vitals.on_battery,
            serving=condition.condition.serving if condition is not None else None,
            departs=self._departs.get(name, []),
            updates=dict(sorted(told.updates.items())),
            seen_at=max((at for at in times if at is not None), default=None),
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


def _phase(view: FleetView, record: RunRecord | None, at_work: bool) -> str:
    """What is being done now."""
    if record is None:
        return "nothing was trained yet"
    if record.state != "active":
        return record.state
    return view.phase if at_work else "interrupted: the coordinator is not running"


def _deployment(files: FleetFiles) -> DeploymentOverview | None:
    if not files.deployments:
        return None
    latest = files.deployments[0]
    return DeploymentOverview(
        deployment=latest.deployment,
        version=latest.version,
        state=latest.state,
        reason=latest.reason,
        started_at=latest.started_at,
        ended_at=latest.ended_at,
        devices=dict(sorted(Counter(one.state for one in files.deployed).items())),
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
