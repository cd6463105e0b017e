"""What is going on, from the coordinator's events: a table that changes on a terminal, plain lines elsewhere.

`FleetView` is the state behind both; it is changed by events alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reft_edge.coordinator.events import (
    DeviceProgress,
    DeviceSeen,
    Distilling,
    Event,
    Exported,
    Finished,
    Planned,
    Quarantined,
    RoundClosed,
    RoundCollected,
    RoundDistilled,
    RoundExtended,
    RoundFailed,
    RoundMerged,
    RoundStarted,
    Started,
    UpdateSeen,
    Waiting,
)
from reft_edge.coordinator.report.figures import metric_text, seconds_text
from reft_edge.errors import one_line

REFRESHES_PER_S = 4


AT_WORK = frozenset({"asked", "accepted", "fetching", "training", "uploading"})
"""Parts of devices from which the round still expects something."""


@dataclass
class DeviceView:
    """One row."""

    device: str
    round: int = 0
    """The latest that it was planned for."""
    part: str = ""
    """What it does in the present round: asked, accepted, fetching, training, uploading, done (its update is here),
    merged, refused, failed, late, rejected, damaged or left out. Empty while it has none."""
    online: bool | None = None
    """None: nothing is known."""
    quarantined: bool = False
    variant: str = ""
    share: float = 0.0
    steps_done: int = 0
    steps_total: int = 0
    loss: float | None = None
    predicted_s: float | None = None
    measured_s: float | None = None
    expected_at: float | None = None
    """Unix seconds when its update should be here by the plan; None before the tasks are out."""
    predicted_round_s: float = 0.0
    reason: str = ""
    """What it, or the coordinator, last said was wrong in this round."""

    @property
    def state(self) -> str:
        """Its part; beside that waiting (never heard of), ready, offline, absent (offline, and something is expected of
        it) or quarantine."""
        if self.quarantined:
            return "quarantine"
        if self.online is False:
            return "absent" if self.part in AT_WORK else "offline"
        return self.part or ("ready" if self.online else "waiting")


@dataclass
class FleetView:
    """All that a watcher sees of a run."""

    title: str = "starting"
    round: int = 0
    rounds: int = 0
    phase: str = "starting the coordinator"
    needed: int = 0
    """Devices that the coordinator waits for; 0 while it does not."""
    metric: str = "accuracy"
    values: list[float | None] = field(default_factory=list)
    """The metric at the end of each round."""
    deadline: float | None = None
    """Unix seconds; None while no round collects updates."""
    devices: dict[str, DeviceView] = field(default_factory=dict)

    def apply(self, event: Event) -> str | None:
        """Take in an event; returns a line worth printing, or None."""
        match event:
            case Started():
                for row in self.devices.values():
                    row.online = False  # a coordinator that begins hears of everybody who is there
                self.title = f"{event.federation}: {event.model}, {event.parameters:,} parameters"
                self.rounds = event.rounds
                return f"{'resumed' if event.resumed else 'started'} {self.title}, {event.rounds} rounds"
            case Waiting():
                self.needed = event.needed
                self._count_devices(event.devices)
            case DeviceSeen():
                return self._seen(event)
            case Planned():
                return self._planned(event)
            case RoundStarted():
                self._started(event)
            case RoundExtended():
                self.deadline = event.deadline
                return f"round {event.round}: no quorum yet, the deadline is extended"
            case RoundCollected():
                self._end_collecting("merging")
                late = f"; late: {', '.join(event.late)}" if event.late else ""
                return f"round {event.round}: {event.counted} of {event.asked} updates came in{late}"
            case DeviceProgress():
                return self._progressed(event)
            case UpdateSeen():
                return self._updated(event)
            case Quarantined():
                self._row(event.device).quarantined = True
                return f"{event.device} is in quarantine until a person lifts it: {event.reason}"
            case RoundMerged():
                self.metric = "mse" if event.mse is not None else "accuracy"
                self._end_collecting("distilling")
                self._merged()
                return f"round {event.round}: merged {event.updates} updates, {self._figure(event)}"
            case Distilling():
                self.phase = f"distilling, epoch {event.epoch} of {event.epochs}"
            case RoundDistilled():
                return f"round {event.round}: distilled from {event.teachers} teachers, {self._figure(event)}"
            case RoundClosed():
                self.values.append(event.accuracy if self.metric == "accuracy" else event.mse)
                self.phase = "planning the next round" if event.round < self.rounds else "exporting"
                return f"round {event.round} of {self.rounds}: {self._figure(event)} in {seconds_text(event.seconds)}"
            case RoundFailed():
                self._end_collecting("planning again")
                return f"round {event.round} failed: {event.reason}"
            case Exported():
                self.phase = f"exported {event.name}"
                return f"exported {event.path}"
            case Finished():
                self.phase = "finished"
        return None

    def _figure(self, event: RoundMerged | RoundDistilled | RoundClosed) -> str:
        value = event.mse if self.metric == "mse" else event.accuracy
        return f"{self.metric} {metric_text(value, self.metric)}"

    def _count_devices(self, n_devices: int) -> None:
        if n_devices < self.needed:
            self.phase = f"waiting for devices ({n_devices} of {self.needed})"
        else:
            self.needed = 0
            self.phase = "planning; variants are pruned and compiled when they are first needed"

    def _row(self, device: str) -> DeviceView:
        return self.devices.setdefault(device, DeviceView(device=device))

    def _seen(self, event: DeviceSeen) -> str | None:
        row = self._row(event.device)
        was_there, row.online = row.online, event.online
        if not event.online:
            return f"{event.device} is offline"
        if event.profile and not was_there:
            if self.needed:
                self._count_devices(sum(bool(one.online) for one in self.devices.values()))
            return f"{event.device} is here, {event.training_samples} samples to train on"
        return None

    def _planned(self, event: Planned) -> str:
        self.round, self.phase = event.round, "sending tasks"
        for row in self.devices.values():
            row.part, row.reason = "", ""
        for plan in event.devices:
            row = self._row(plan.device)
            row.round, row.part, row.variant, row.share = event.round, "asked", plan.variant, plan.share
            row.steps_done, row.steps_total, row.loss = 0, 0, None
            expected = plan.prediction
            row.predicted_s = expected.download_s + expected.start_s + expected.training_s
            row.measured_s, row.expected_at, row.predicted_round_s = None, None, plan.predicted_round_s
            row.quarantined = False  # else it would have no task
        for excluded in event.excluded:
            row = self._row(excluded.device)
            row.part, row.reason = "left out", excluded.reason
        plans = ", ".join(f"{plan.device} {plan.share:.0%}" for plan in event.devices)
        left_out = "".join(f"; {one.device} is left out: {one.reason}" for one in event.excluded)
        return f"round {event.round}: {plans or 'nobody'}{left_out}"

    def _started(self, event: RoundStarted) -> None:
        self.round, self.phase, self.deadline = event.round, "devices train", event.deadline
        for device in event.devices:
            row = self._row(device)
            if event.at is not None and row.expected_at is None:
                row.expected_at = event.at + row.predicted_round_s

    def _progressed(self, event: DeviceProgress) -> str | None:
        row = self._row(event.device)
        if event.state in AT_WORK:
            row.online = True
        if row.part != "late":  # it does not know yet that the round went on without it
            row.part, row.reason = event.state, event.reason
        if event.steps_total:
            row.steps_done, row.steps_total = event.steps_done, event.steps_total
        row.loss = event.loss if event.loss is not None else row.loss
        if event.state in ("refused", "failed"):
            return f"round {event.round}: {event.device} {event.state}: {event.reason}"
        return None

    def _updated(self, event: UpdateSeen) -> str | None:
        if event.state == "duplicate":  # a device repeats itself until it is sure; that is how it should be
            return None
        row = self._row(event.device)
        measured_s = None
        if event.measured is not None:
            measured_s = event.measured.download_s + event.measured.start_s + event.measured.training_s
        if event.round >= row.round:  # else it is late for a round that is over, and works on the present one
            row.part, row.reason = "done" if event.state == "received" else event.state, event.reason
            row.steps_done = row.steps_total
            row.loss = event.loss_last if event.loss_last is not None else row.loss
            row.measured_s = measured_s if measured_s is not None else row.measured_s
        if event.state == "received":
            return f"round {event.round}: update of {event.device}, {seconds_text(measured_s)}"
        reason = f": {event.reason}" if event.reason else ""
        return f"round {event.round}: update of {event.device} is {event.state}{reason}"

    def _end_collecting(self, phase: str) -> None:
        """Whoever has not answered by now is late."""
        self.phase, self.deadline = phase, None
        for row in self.devices.values():
            if row.part in AT_WORK:
                row.part, row.reason = "late", "no update when the round ended"

    def _merged(self) -> None:
        for row in self.devices.values():
            if row.part == "done":
                row.part = "merged"


class Watcher(Protocol):
    """Shows events as they come. A context manager."""

    def __enter__(self) -> Watcher: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, event: Event) -> None: ...

    def say(self, line: str) -> None: ...


class PlainWatcher:
    """A line for what is worth one."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._view = FleetView()
        self._write = write

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to put away."""

    def show(self, event: Event) -> None:
        line = self._view.apply(event)
        if line is not None:
            self._write(one_line(line))  # with what devices gave as reasons

    def say(self, line: str) -> None:
        self._write(one_line(line))


class TableWatcher:
    """A table that is drawn anew some times a second."""

    def __init__(self, console: Console) -> None:
        self._view = FleetView()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_S)

    def __enter__(self) -> Watcher:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, traceback)

    def show(self, event: Event) -> None:
        self._view.apply(event)

    def say(self, line: str) -> None:
        self._view.phase = line

    def _render(self) -> RenderableType:
        return render(self._view)


def watcher(console: Console) -> Watcher:
    """The one that suits where `console` writes."""
    if console.is_terminal:
        return TableWatcher(console)
    return PlainWatcher(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


def render(view: FleetView) -> RenderableType:
    """The view as rich draws it."""
    heading = Text(f"{view.title}\n", style="bold")
    place = f"round {view.round} of {view.rounds}" if view.round else "before the first round"
    heading.append(f"{place}: {view.phase}", style="default")
    if view.values:
        figures = " ".join(metric_text(value, view.metric) for value in view.values)
        heading.append(f"\n{view.metric} by round: {figures}", style="green")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("device", "state", "of the model", "progress", "loss", "predicted", "measured"):
        table.add_column(name, style="default", justify="right" if name in ("of the model", "loss") else "left")
    for row in view.devices.values():
        table.add_row(
            row.device,
            row.state,
            f"{row.share:.0%}" if row.variant else "",
            ProgressBar(total=max(1, row.steps_total), completed=row.steps_done, width=24),
            "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.predicted_s is None else seconds_text(row.predicted_s),
            "" if row.measured_s is None else seconds_text(row.measured_s),
        )
    return Group(heading, table)
