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
    RoundDistilled,
    RoundFailed,
    RoundMerged,
    RoundStarted,
    Started,
    UpdateSeen,
    Waiting,
)
from reft_edge.coordinator.report.page import metric_text, seconds_text
from reft_edge.errors import one_line

REFRESHES_PER_S = 4


@dataclass
class DeviceView:
    """One row."""

    device: str
    state: str = "waiting"
    variant: str = ""
    share: float = 0.0
    steps_done: int = 0
    steps_total: int = 0
    loss: float | None = None
    predicted_s: float | None = None
    measured_s: float | None = None


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
    devices: dict[str, DeviceView] = field(default_factory=dict)

    def apply(self, event: Event) -> str | None:
        """Take in an event; returns a line worth printing, or None."""
        match event:
            case Started():
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
                self.round, self.phase = event.round, "devices train"
            case DeviceProgress():
                return self._progressed(event)
            case UpdateSeen():
                return self._updated(event)
            case Quarantined():
                self._row(event.device).state = "quarantine"
                return f"{event.device} is in quarantine until a person lifts it: {event.reason}"
            case RoundMerged():
                self.metric = "mse" if event.mse is not None else "accuracy"
                self.phase = "distilling"
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
        if not event.online:
            row.state = "offline"
            return f"{event.device} is offline"
        if event.profile and row.state in ("waiting", "offline"):
            row.state = "ready"
            if self.needed:
                self._count_devices(sum(one.state == "ready" for one in self.devices.values()))
            return f"{event.device} is here, {event.training_samples} samples to train on"
        return None

    def _planned(self, event: Planned) -> str:
        self.round, self.phase = event.round, "sending tasks"
        for plan in event.devices:
            row = self._row(plan.device)
            row.state, row.variant, row.share = "asked", plan.variant, plan.share
            row.steps_done, row.steps_total, row.loss = 0, 0, None
            expected = plan.prediction
            row.predicted_s = expected.download_s + expected.start_s + expected.training_s
            row.measured_s = None
        for excluded in event.excluded:
            self._row(excluded.device).state = "left out"
        plans = ", ".join(f"{plan.device} {plan.share:.0%}" for plan in event.devices)
        left_out = "".join(f"; {one.device} is left out: {one.reason}" for one in event.excluded)
        return f"round {event.round}: {plans or 'nobody'}{left_out}"

    def _progressed(self, event: DeviceProgress) -> str | None:
        row = self._row(event.device)
        row.state = event.state
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
        row.state = "done" if event.state == "received" else event.state
        row.steps_done = row.steps_total
        row.loss = event.loss_last if event.loss_last is not None else row.loss
        if event.measured is not None:
            row.measured_s = event.measured.download_s + event.measured.start_s + event.measured.training_s
        if event.state == "received":
            return f"round {event.round}: update of {event.device}, {seconds_text(row.measured_s)}"
        reason = f": {event.reason}" if event.reason else ""
        return f"round {event.round}: update of {event.device} is {event.state}{reason}"


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
