"""What processes that predict have counted: errors always, classes and confidence where the device's owner allows it.

That what was deployed fails says nothing about anybody's data, and a canary that may not say so is none. How often each
class was the answer, and how confidently, is for the owner to allow: [serving] report.

Each process has a file of its own, `<spool>/serving/counts/<pid>-<start>.json`, which it replaces every few seconds
while it predicts, and at its first error at once; the agent's daemon sums them. A process holds a lock on its file, so
that the files of processes that have ended are told from the others, also where their numbers are used again; the next
process that counts adds them to one file and removes them. Counts are kept by deployment, so a version that is deployed
once more begins at 0.

Neither an input nor a single prediction is kept, nor when one was made. Loads no numpy: the daemon reads counts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from reft_edge.agent.spool import locked, write_atomically
from reft_edge.errors import ResourceError
from reft_edge.wire.deployment import CONFIDENCE_BINS, MAX_COUNTED_CLASSES, PredictionCounts

if TYPE_CHECKING:
    from reft_edge.agent.serving.prediction import Prediction

WRITE_EVERY_S = 5.0
"""What a process that is killed has not counted. Written without syncing: nothing hangs on these seconds."""

MAX_DEPLOYMENTS = 4
"""Whose counts one file keeps: what is served now, what was before, and a few that a process still goes on with."""

MAX_FILE_BYTES = 256 * 1024
"""A file of four deployments with a thousand classes each takes some 50 KB."""

LATENCY_EDGES_S = tuple(1e-4 * 2 ** (step / 4) for step in range(80))
"""Upper edges of the bins in which times of one call are counted: 0.1 ms to 88 s, each 19% above the last."""

_ENDED = "ended.json"
"""What processes that have ended had counted."""

_LOCK = "lock"

_PARTIAL = ".tmp"
"""A file that is not complete, beside the one that it is to replace."""

logger = logging.getLogger(__name__)


class DeploymentCounts(msgspec.Struct, kw_only=True):
    """Of one deployment in one process, or in several that have ended."""

    predictions: Annotated[int, Meta(ge=0)] = 0
    errors: Annotated[int, Meta(ge=0)] = 0
    classes: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=MAX_COUNTED_CLASSES)] = []
    confidence: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=CONFIDENCE_BINS)] = []
    latency: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=len(LATENCY_EDGES_S) + 1)] = []
    """Calls by how long they took (`LATENCY_EDGES_S`); the last entry: longer."""

    def add(self, other: DeploymentCounts) -> None:
        self.predictions += other.predictions
        self.errors += other.errors
        for mine, others in (
            (self.classes, other.classes),
            (self.confidence, other.confidence),
            (self.latency, other.latency),
        ):
            add_entries(mine, others)

    def message(self, version: str) -> PredictionCounts:
        """As the coordinator is told."""
        return PredictionCounts(
            version=version,
            predictions=self.predictions,
            errors=self.errors,
            classes=tuple(self.classes),
            confidence=tuple(self.confidence),
            latency_p95_s=latency_percentile(self.latency, 0.95),
        )


class CountsFile(msgspec.Struct, kw_only=True):
    """Deployments in the order in which they last predicted."""

    deployments: dict[str, DeploymentCounts] = {}
    folded: tuple[Annotated[str, Meta(pattern=r"^[0-9]+-[0-9]+\.json$")], ...] = ()
    """In `ended.json`: names of files that it holds the counts of already, and that are still to be removed."""

    def of(self, deployment: str) -> DeploymentCounts:
        """Counts of `deployment`, to be added to; the one that predicted longest ago makes room for them."""
        found = self.deployments.pop(deployment, None) or DeploymentCounts()
        self.deployments[deployment] = found
        while len(self.deployments) > MAX_DEPLOYMENTS:
            del self.deployments[next(iter(self.deployments))]
        return found


class CountsWriter:
    """Counts what this process predicts in a file of its own in `folder`; both are made when there is something to do.

    `errors_only`: nothing else is counted. Never fails: where nothing can be written it says so once. Any
    number of threads may use it at a time.
    """

    def __init__(self, folder: Path, *, errors_only: bool = False, write_every_s: float = WRITE_EVERY_S) -> None:
        self._folder = folder
        self._errors_only = errors_only
        self._write_every_s = write_every_s
        self._counts = CountsFile()
        self._changed = threading.Condition()
        self._is_changed = False
        self._is_urgent = False
        self._is_closed = False
        self._told = False
        self._descriptor: int | None = None
        self._thread: threading.Thread | None = None

    def add(self, deployment: str, prediction: Prediction, *, duration_s: float) -> None:
        """Count a call and its samples."""
        if self._errors_only:
            return
        indices, confidence = prediction.indices, prediction.confidence
        with self._changed:
            counts = self._counts.of(deployment)
            counts.predictions += len(prediction)
            _count(counts.latency, bisect_left(LATENCY_EDGES_S, duration_s))
            if indices is not None and confidence is not None:
                for index in indices.tolist():
                    _count(counts.classes, min(index, MAX_COUNTED_CLASSES - 1))
                for share in confidence.tolist():
                    _count(counts.confidence, confidence_bin(share))
            self._notify()

    def add_error(self, deployment: str) -> None:
        """Count a call that failed, and not because of its input. The first one is written at once."""
        with self._changed:
            counts = self._counts.of(deployment)
            counts.errors += 1
            self._is_urgent |= counts.errors == 1
            self._notify()

    def close(self) -> None:
        """Write what is not written yet. Nothing more may be counted."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():  # which may collect garbage
            thread.join()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _notify(self) -> None:
        self._is_changed = True
        self._changed.notify_all()
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(target=self._write_now_and_then, name="reft-edge-counts", daemon=True)
            self._thread.start()

    def _write_now_and_then(self) -> None:
        path = self._folder / f"{os.getpid()}-{time.time_ns()}.json"  # a name that no file has had
        self._prepare()
        is_last = False
        while not is_last:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._is_changed)
                self._changed.wait_for(lambda: self._is_closed or self._is_urgent, timeout=self._write_every_s)
                is_last = self._is_closed
                data = msgspec.json.encode(self._counts) if self._is_changed else None
                self._is_changed = self._is_urgent = False
            if data is not None:
                self._write(path, data)

    def _prepare(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fold_ended(self._folder)
        except (OSError, ResourceError) as exc:
            self._tell(exc)

    def _write(self, path: Path, data: bytes) -> None:
        """Replace the file; the new one is locked before it can be seen."""
        partial = path.with_suffix(_PARTIAL)
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(data)
                partial.replace(path)
            except OSError:
                os.close(descriptor)
                partial.unlink(missing_ok=True)
                raise
        except OSError as exc:
            self._tell(exc)
            return
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = descriptor

    def _tell(self, error: OSError | ResourceError) -> None:
        if not self._told:
            self._told = True
            logger.warning("%s: what is predicted cannot be counted: %s", self._folder, error)


def read_counts(folder: Path, deployment: str, version: str, *, errors_only: bool = False) -> PredictionCounts | None:
    """What all processes have counted of `deployment`, which brought `version`; None: nothing. Never fails.

    `errors_only`: nothing else is told, whatever was counted.
    """
    total = DeploymentCounts()
    try:
        with locked(folder / _LOCK):
            for file in _read_all(folder):
                total.add(file.deployments.get(deployment, DeploymentCounts()))
    except OSError:  # nobody has ever counted, or the folder is not ours
        return None
    if errors_only:
        total = DeploymentCounts(errors=total.errors)
    return total.message(version) if total.predictions or total.errors else None


def fold_ended(folder: Path) -> None:
    """Add the files of processes that have ended to one, and remove them. Raises `OSError` or `ResourceError`.

    A kill at any moment neither loses a count nor counts one twice.
    """
    with locked(folder / _LOCK):
        ended = _read(folder / _ENDED) or CountsFile()
        _remove(folder, ended.folded)  # what a kill has left
        names = [path.name for path in _files(folder) if _has_ended(path)]
        for name in names:
            found = _read(folder / name)
            if found is None:
                logger.warning("%s is of no use and is removed", folder / name)
                continue
            for deployment, counts in found.deployments.items():
                ended.of(deployment).add(counts)
        if not names:
            return
        ended.folded = tuple(names)
        write_atomically(folder / _ENDED, msgspec.json.encode(ended))
        _remove(folder, names)


def confidence_bin(share: float) -> int:
    """Which of `CONFIDENCE_BINS` a probability falls into; 1 into the last."""
    return min(max(int(share * CONFIDENCE_BINS), 0), CONFIDENCE_BINS - 1)


def latency_percentile(bins: Sequence[int], share: float) -> float | None:
    """Upper edge of the bin in which the percentile lies; None when nothing was counted."""
    wanted = share * sum(bins)
    passed = 0
    for index, count in enumerate(bins):
        passed += count
        if count and passed >= wanted:
            return LATENCY_EDGES_S[min(index, len(LATENCY_EDGES_S) - 1)]
    return None


def add_entries(mine: list[int], others: Sequence[int]) -> None:
    """Add entry to entry; the longer one's length is the sum's."""
    mine.extend([0] * (len(others) - len(mine)))
    for index, count in enumerate(others):
        mine[index] += count


def _count(bins: list[int], index: int) -> None:
    bins.extend([0] * (index + 1 - len(bins)))
    bins[index] += 1


def _read_all(folder: Path) -> Iterator[CountsFile]:
    """Each file once; those that are in `ended.json` already are left out."""
    ended = _read(folder / _ENDED)
    folded: tuple[str, ...] = ()
    if ended is not None:
        folded = ended.folded
        yield ended
    for path in _files(folder):
        if path.name not in folded and (found := _read(path)) is not None:
            yield found


def _files(folder: Path) -> list[Path]:
    """Of single processes."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and path.name != _ENDED)
    except OSError:
        return []


def _read(path: Path) -> CountsFile | None:
    """None for a file that is away or of no use."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        return msgspec.json.decode(path.read_bytes(), type=CountsFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _has_ended(path: Path) -> bool:
    """Whether the process has ended whose file this is: nobody holds the lock on it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == path.stat().st_ino  # else replaced since: its process lives
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Files of processes that have ended, with what they were about to replace them by."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).with_suffix(_PARTIAL).unlink(missing_ok=True)
