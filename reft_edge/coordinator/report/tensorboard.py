"""A run's scalars for TensorBoard, from its events: while it goes on, or afterwards.

Every run has a folder of its own below the one that TensorBoard looks at, so that runs are compared by their curves.
The step is the round; of a distillation the epoch, counted over all rounds. Times are the events' own. What a device
measured is shown when its round has closed, and not if its update was rejected: then it is not believed.

Written with tensorboardX, which needs nothing that onnx does not need as well; torch's own writer needs all of
TensorBoard on the coordinator's machine. Of tensorboardX only the file's format is used: its `SummaryWriter` writes in
a thread, and once that has died of a full disk whoever goes on adding scalars waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from reft_edge.coordinator.event_log import EVENTS_FILE, read_log
from reft_edge.coordinator.events import (
    Distilling,
    Event,
    Planned,
    RoundClosed,
    RoundDistilled,
    RoundMerged,
    Started,
    UpdateSeen,
)
from reft_edge.errors import ConfigError, FederationError, ResourceError

try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event as Record
    from tensorboardX.proto.summary_pb2 import Summary
except ModuleNotFoundError as exc:
    hint = "curves for TensorBoard need the package tensorboardX; install it with: pip install 'reft-edge[tensorboard]'"
    raise ConfigError(hint) from exc

_log = logging.getLogger(__name__)


def write_run(events: Sequence[Event], folder: Path) -> Path:
    """Write a run into a folder of its own below `folder`; returns that.

    Raises `FederationError` for events that do not say which run they are of, `ResourceError` from the disk.
    """
    started = next((event for event in events if isinstance(event, Started)), None)
    if started is None:
        raise FederationError("the run's log lacks its beginning, and so its name")
    with contextlib.closing(RunScalars(folder / started.run)) as scalars:
        for event in events:
            scalars.show(event)
    return folder / started.run


class LiveScalars:
    """Writes a run into `folder` as it goes on: what is in its log below `results` already, then event by event.

    A disk that fills up in the middle costs the curves and not the run.
    """

    def __init__(self, folder: Path, *, results: Path) -> None:
        self._folder = folder
        self._results = results
        self._scalars: RunScalars | None = None

    def close(self) -> None:
        """Never fails: the run is more than its curves."""
        scalars, self._scalars = self._scalars, None
        if scalars is not None:
            with contextlib.suppress(ResourceError):
                scalars.close()

    def show(self, event: Event) -> None:
        """Take in an event. Raises `ResourceError` when the folder cannot be written as a run begins."""
        if isinstance(event, Started):
            self.close()
            self._scalars = RunScalars(self._folder / event.run)
            for earlier in read_log(self._results / event.run / EVENTS_FILE):  # ends with this very event
                self._scalars.show(earlier)
        elif self._scalars is not None:
            try:
                self._scalars.show(event)
            except ResourceError as exc:
                _log.warning("%s; no more curves for TensorBoard", exc)
                self.close()


class RunScalars:
    """Writes a run's events into `folder`, in place of what earlier ones wrote there. Raises `ResourceError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._epochs_before = 0
        """Of distillations of earlier rounds."""
        self._epoch = 0
        self._updates: dict[str, UpdateSeen] = {}
        """Of the present round, by device: what was said of each last."""
        with self._disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._file = EventsWriter(str(folder / "events"))

    def close(self) -> None:
        with self._disk_errors():
            self._file.close()

    def show(self, event: Event) -> None:
        """Take in an event."""
        with self._disk_errors():
            if isinstance(event, Distilling):
                self._epoch = event.epoch
                self._add("distillation/loss", event.loss, self._epochs_before + event.epoch, event.at)
            for tag, value in self._of(event):
                self._add(tag, value, getattr(event, "round", 0), event.at)
            if isinstance(event, RoundMerged | RoundDistilled | RoundClosed):
                self._file.flush()
        if isinstance(event, RoundDistilled | RoundClosed):
            self._epochs_before, self._epoch = self._epochs_before + self._epoch, 0

    def _of(self, event: Event) -> Iterator[tuple[str, float | None]]:
        """The scalars that an event of a round brings."""
        match event:
            case Planned():
                self._updates.clear()
                yield from _planned(event)
            case UpdateSeen():
                if event.state != "duplicate":
                    self._updates[event.device] = event
            case RoundMerged():
                yield "accuracy/averaged", event.accuracy_before_batch_norm
                yield from _stage("merged", event)
            case RoundDistilled():
                yield from _stage("distilled", event)
                yield "distillation/kept_epoch", event.kept_epoch
            case RoundClosed():
                yield from _closed(event)
                yield from _updated(self._updates.values())
                self._updates.clear()

    def _add(self, tag: str, value: float | None, step: int, at: float | None) -> None:
        if value is not None:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            self._file.write_event(Record(wall_time=at or 0.0, step=step, summary=summary))

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise ResourceError(f"{self._folder} cannot be written: {exc.strerror or exc}") from exc


def _planned(event: Planned) -> Iterable[tuple[str, float]]:
    for plan in event.devices:
        expected = plan.prediction
        yield f"predicted_seconds/{plan.device}", expected.download_s + expected.start_s + expected.training_s
        yield f"predicted_memory_bytes/{plan.device}", expected.peak_memory_bytes
        yield f"share_of_model/{plan.device}", plan.share


def _updated(updates: Collection[UpdateSeen]) -> Iterable[tuple[str, float | None]]:
    for state, count in Counter(event.state for event in updates).items():
        yield f"updates/{state}", count
    for event in updates:
        if (took := event.measured) is not None and event.state != "rejected":
            yield f"measured_seconds/{event.device}", took.download_s + took.start_s + took.training_s
            yield f"measured_memory_bytes/{event.device}", took.peak_memory_bytes
            yield f"training_loss/{event.device}", event.loss_last


def _stage(stage: str, event: RoundMerged | RoundDistilled) -> Iterable[tuple[str, float | None]]:
    yield f"accuracy/{stage}", event.accuracy
    yield f"mse/{stage}", event.mse
    yield f"loss/{stage}", event.loss


def _closed(event: RoundClosed) -> Iterable[tuple[str, float | None]]:
    yield "accuracy/round", event.accuracy
    yield "mse/round", event.mse
    yield "round/seconds", event.seconds
    yield "round/asked", event.asked
    yield "round/counted", event.counted
    yield "bytes/down", sum(carried.down_bytes for carried in event.traffic)
    yield "bytes/up", sum(carried.up_bytes for carried in event.traffic)
    for carried in event.traffic:
        yield f"down_bytes/{carried.device}", carried.down_bytes
        yield f"up_bytes/{carried.device}", carried.up_bytes
