"""A deployment as it goes on: a table that changes on a terminal, plain lines elsewhere, and a table at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from reft_edge.coordinator.deploying.deployer import Progress
from reft_edge.coordinator.deploying.planning import DeploymentPlan
from reft_edge.coordinator.records import DeployedDevice, DeploymentRecord
from reft_edge.coordinator.report.figures import metric_text
from reft_edge.coordinator.report.terminal import new_table, right_aligned
from reft_edge.errors import one_line

REFRESHES_PER_S = 4

MAX_ROWS = 40
"""Of the table that changes: those that changed last. A terminal has so many lines."""

STATES = {
    "canary": "the canaries are asked",
    "soaking": "the canaries serve it and are watched",
    "rolling_out": "the rest is asked",
    "rolling_back": "everybody who was asked goes back",
    "done": "done",
    "rolled_back": "rolled back",
    "interrupted": "interrupted",
}
"""What a deployment in each state is doing, in words."""


class Watcher(Protocol):
    """A block in which a deployment is shown."""

    def __enter__(self) -> Watcher: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None: ...


class PlainWatcher:
    """A line for every answer and every new state."""

    def __init__(self, write: Callable[[str], None], metric: str) -> None:
        self._write = write
        self._metric = metric
        self._state = ""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to put away."""

    def show(self, progress: Progress) -> None:
        """The answers, then the state that they have led to, then who is asked because of that."""
        told = [part for part in progress.changed if part.state != "waiting"]
        if progress.record.state != self._state:
            self._state = progress.record.state
            asked = [part for part in told if part.asked_at == progress.record.since]
            self._write_parts(part for part in told if part not in asked)
            self._write(one_line(headline(progress)))
            told = asked
        self._write_parts(told)

    def _write_parts(self, parts: Iterable[DeployedDevice]) -> None:
        for part in parts:
            self._write(one_line(f"{part.device}: {describe(part, self._metric)}"))


class TableWatcher:
    """A table that is drawn anew some times a second."""

    def __init__(self, console: Console, metric: str) -> None:
        self._metric = metric
        self._progress: Progress | None = None
        self._recent: dict[str, None] = {}
        """Devices, the one that changed last at the end."""
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_S)

    def __enter__(self) -> Watcher:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, traceback)

    def show(self, progress: Progress) -> None:
        self._progress = progress
        for part in progress.changed:
            self._recent.pop(part.device, None)
            self._recent[part.device] = None

    def _render(self) -> RenderableType:
        if self._progress is None:
            return Text("looking who is there")
        shown = set(list(self._recent)[-MAX_ROWS:])
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("device", "wave", "model", "state"):
            table.add_column(name)
        for part in self._progress.devices:
            if part.device in shown:
                table.add_row(part.device, part.wave, part.model, Text(one_line(describe(part, self._metric))))
        return Group(Text(one_line(headline(self._progress)), style="bold"), table)


def watcher(console: Console, metric: str) -> Watcher:
    """The one that suits where `console` writes."""
    if console.is_terminal:
        return TableWatcher(console, metric)
    return PlainWatcher(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True), metric)


def headline(progress: Progress) -> str:
    record = progress.record
    counts = Counter(part.state.replace("_", " ") for part in progress.devices)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    reason = f": {record.reason}" if record.reason else ""
    return f"version {record.version}, {STATES[record.state]}{reason} ({states})"


def describe(part: DeployedDevice, metric: str) -> str:
    """How a device stands, in words."""
    words = part.state.replace("_", " ")
    if part.undone and part.state == "asked":
        words = "told to go back"
    if part.reason:
        return f"{words}: {part.reason}"
    health = part.measured
    if part.state != "serving" or health is None:
        return words
    figures = [f"{part.model} {health.precision}"]
    if health.metric is not None:
        before = "" if health.metric_before is None else f" ({metric_text(health.metric_before, metric)} before)"
        figures.append(f"{metric} {metric_text(health.metric, metric)} on {health.holdout_samples} samples{before}")
    figures.append(f"p95 {milliseconds_text(health.latency_p95_s)}")
    return f"{words} {', '.join(figures)}"


def milliseconds_text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"


def print_plan(version: str, plan: DeploymentPlan, console: Console) -> None:
    """Who would get what, and why."""
    table = new_table(f"Version {version}: who gets what", "device")
    table.add_column("wave", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("why")
    for part in plan.parts:
        wave = "-" if part.state == "serving" else part.wave
        table.add_row(part.device, wave, part.model, Text(one_line(part.why)))
    for left_out in plan.left_out:
        table.add_row(left_out.device, "-", "-", Text(one_line(left_out.reason)))
    console.print(table)


def print_outcome(
    record: DeploymentRecord,
    devices: Sequence[DeployedDevice],
    console: Console,
    metric: str,
    *,
    min_holdout_samples: int,
) -> None:
    """A row a device. Reasons stand below, where they have room; names that are too long go on in the next line."""
    table = new_table(f"Version {record.version}: {STATES[record.state]}", "device")
    table.columns[0].no_wrap = False
    table.columns[0].overflow = "fold"
    table.add_column("model", overflow="fold")
    table.add_column("precision", no_wrap=True)
    right_aligned(table, "before", metric, "p95")
    table.add_column("state", no_wrap=True)
    for part in devices:
        health = part.measured
        table.add_row(
            part.device,
            part.model,
            part.precision or "-",
            metric_text(None if health is None else health.metric_before, metric),
            metric_text(None if health is None else health.metric, metric),
            milliseconds_text(None if health is None else health.latency_p95_s),
            part.state.replace("_", " "),
        )
    console.print(table)
    for part in devices:
        if part.reason:
            console.print(one_line(f"{part.device}: {part.reason}"), markup=False, highlight=False, soft_wrap=True)
    unjudged = [part.device for part in devices if part.state == "serving" and _few(part, min_holdout_samples)]
    if unjudged:
        console.print(
            f"No rule of {metric} was applied to it on {', '.join(unjudged)}: fewer than {min_holdout_samples} samples "
            "are held out there (min_holdout_samples)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if record.reason:
        console.print(one_line(f"Why: {record.reason}"), markup=False, highlight=False, soft_wrap=True)


def _few(part: DeployedDevice, least: int) -> bool:
    """Whether the device had too few samples to judge it by."""
    return part.measured is not None and part.measured.holdout_samples < least
