"""The words of the session: its state, the events it takes, and the actions it answers with. Value objects only."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from reft_edge.bundle.manifest import BlobRef
from reft_edge.wire.messages import Done, Failed, Measured, Name, Refused, Report, Task, UpdateManifest

FailureKind: TypeAlias = Literal["out_of_memory", "crashed", "data", "bundle", "timeout", "diverged", "storage"]


class Phase(enum.Enum):
    IDLE = "idle"
    READING = "reading"
    """Fetching and reading the bundle's manifest."""
    FETCHING = "fetching"
    """Fetching graphs and weights."""
    TRAINING = "training"
    UPLOADING = "uploading"
    """The update lies in the spool and waits to be pulled."""


class Residual(msgspec.Struct, frozen=True, kw_only=True):
    """What the next update's encoding goes on from (`wire.compensation`), kept by the worker in the spool."""

    name: str
    """File name in the spool's folder of residuals."""
    key: str
    """The run, the variant and the method it belongs to; it means nothing to any other."""
    update: str = ""
    """SHA-256 of the update that left it."""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """How far the device has come in what one coordinator says: lower sequences are old messages, played again."""

    signer: str
    """Fingerprint of the coordinator's key, or the run where nothing is signed. Another signer counts anew."""
    sequence: int


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """All that survives a restart."""

    phase: Phase = Phase.IDLE
    task: Task | None = None
    parts: tuple[BlobRef, ...] = ()
    """Blobs of the task besides its manifest; until that is read, those of the task before, whose graphs may return."""
    missing: tuple[str, ...] = ()
    """Hashes of `parts` that are not here yet."""
    began_at: float = 0.0
    """Monotonic clock when the task came; of this process only."""
    download_s: float = 0.0
    down_bytes: int = 0
    """Of blobs that were fetched for this task."""
    whole: bool = False
    """Whether the task's delta was of no use: its weights are fetched whole."""
    attempts: int = 0
    """How often training of this task was begun."""
    outcome: Refused | Failed | Done | None = None
    """How the task ended, to be said again when the task is delivered again."""
    residual: Residual | None = None
    """Of the last update."""
    merged: Residual | None = None
    """Where the coordinator has a memory as well: what the last update went on from. It may not be merged, and the next
    one goes on from here again then."""
    mark: Mark | None = None
    """Of the message on `task` that was accepted last; outlives tasks and runs."""


# Events


@dataclass(frozen=True, kw_only=True)
class TaskArrived:
    """`mark` is the message's own; so in `RunClosed`."""

    task: Task
    mark: Mark | None = None


@dataclass(frozen=True, kw_only=True)
class RunClosed:
    """The coordinator's run has ended."""

    mark: Mark | None = None


@dataclass(frozen=True, kw_only=True)
class LinkUp:
    """Connected to the broker, perhaps after it lost what we said before."""


@dataclass(frozen=True, kw_only=True)
class ReminderDue:
    """Time to say again that the update is ready."""


@dataclass(frozen=True, kw_only=True)
class BlobFetched:
    sha256: str
    was_here: bool = False
    """Whether it lay in the spool already."""


@dataclass(frozen=True, kw_only=True)
class BlobLost:
    sha256: str
    reason: str
    no_room: bool = False
    """Whether it cannot be stored here; else the coordinator no longer has it, or sends another."""


@dataclass(frozen=True, kw_only=True)
class ManifestAccepted:
    """The manifest fits this device; `parts` are the blobs that training needs."""

    parts: tuple[BlobRef, ...]


@dataclass(frozen=True, kw_only=True)
class ManifestRefused:
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrainingProgressed:
    task: Name
    steps_done: int
    steps_total: int
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingFinished:
    """`measured.download_s` and `down_bytes` are filled in here: the worker does not know them."""

    task: Name
    update: UpdateManifest
    measured: Measured
    residual: Residual | None


@dataclass(frozen=True, kw_only=True)
class DeltaUseless:
    """The weights cannot be put together from base and delta; nothing was trained."""

    task: Name
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrainingFailed:
    task: Name
    kind: FailureKind
    reason: str


@dataclass(frozen=True, kw_only=True)
class BlobDelivered:
    """The coordinator's receipt for a blob of ours."""

    sha256: str


SessionEvent: TypeAlias = (
    TaskArrived
    | RunClosed
    | LinkUp
    | ReminderDue
    | BlobFetched
    | BlobLost
    | ManifestAccepted
    | ManifestRefused
    | TrainingProgressed
    | TrainingFinished
    | TrainingFailed
    | DeltaUseless
    | BlobDelivered
)


# Actions


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Bring a blob into the spool; `BlobFetched` at once if it is there."""

    ref: BlobRef
    broadcast: bool


@dataclass(frozen=True, kw_only=True)
class ReadManifest:
    """Read and check the manifest's blob; answer with `ManifestAccepted` or `ManifestRefused`."""

    task: Task
    whole: bool
    """As in `SessionState`."""


@dataclass(frozen=True, kw_only=True)
class StartTraining:
    task: Task
    residual: Residual | None


@dataclass(frozen=True, kw_only=True)
class StopTraining:
    """The worker's present work is of no use any more."""


@dataclass(frozen=True, kw_only=True)
class ReleaseWorker:
    """There will be no work for a while."""


@dataclass(frozen=True, kw_only=True)
class Say:
    report: Report


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Forget transfers, blobs and residuals that `Session.needed_blobs` and the state do not name."""


Action: TypeAlias = Fetch | ReadManifest | StartTraining | StopTraining | ReleaseWorker | Say | Sweep
Actions: TypeAlias = tuple[Action, ...]
