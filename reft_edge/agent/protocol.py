"""What the daemon and its worker process say to each other: one JSON object a line, over the worker's stdin and stdout.

Both ends are ours and of one version, so a malformed line is a bug or a dying process, never an attack. Blobs do not
pass through here: both ends know the spool's directory.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from reft_edge.agent.serving.deployment_words import Reproach
from reft_edge.agent.session_words import FailureKind, Residual
from reft_edge.agent.settings import Limits
from reft_edge.data.description import DataDescription
from reft_edge.data.settings import DataSettings
from reft_edge.errors import LocalProtocolError
from reft_edge.logs import LogFormat
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire.deployment import Deploy, Health
from reft_edge.wire.messages import Measured, Task, UpdateManifest


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag="configure"):
    """First line to a new worker."""

    device: str
    data: DataSettings
    base_dir: str
    """Folder that relative paths of the data start from."""
    spool: str
    limits: Limits
    log_level: int = 20
    """A level of the `logging` module."""
    log_format: LogFormat = "text"


class MeasureDevice(msgspec.Struct, frozen=True, kw_only=True, tag="measure"):
    quick: bool


class DescribeData(msgspec.Struct, frozen=True, kw_only=True, tag="describe"):
    pass


class Train(msgspec.Struct, frozen=True, kw_only=True, tag="train"):
    task: Task
    residual: Residual | None = None
    asked_at: float
    """System-wide monotonic clock in seconds: `Measured.start_s` counts from here."""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Do not begin this task, or stop it after its present step. Answered by `Stopped` if it was in progress."""

    task: str


class CheckModel(msgspec.Struct, frozen=True, kw_only=True, tag="check_model"):
    """Its blobs lie in the spool. A check is not cancelled: its worker is ended."""

    deploy: Deploy


Command: TypeAlias = Configure | MeasureDevice | DescribeData | Train | Cancel | CheckModel


class DeviceMeasured(msgspec.Struct, frozen=True, kw_only=True, tag="measured"):
    profile: DeviceProfile


class DataDescribed(msgspec.Struct, frozen=True, kw_only=True, tag="described"):
    description: DataDescription


class DataRefused(msgspec.Struct, frozen=True, kw_only=True, tag="data_refused"):
    """The data cannot be used; a person has to act."""

    reason: str


class TrainingProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    task: str
    steps_done: int
    steps_total: int
    loss: float | None


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The update lies in the spool."""

    task: str
    update: UpdateManifest
    measured: Measured
    residual: Residual | None


class TaskFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    task: str
    kind: FailureKind
    reason: str


class DeltaRefused(msgspec.Struct, frozen=True, kw_only=True, tag="delta_refused"):
    """Base and delta do not give the task's weights, or are not here."""

    task: str
    reason: str


class Stopped(msgspec.Struct, frozen=True, kw_only=True, tag="stopped"):
    """A cancelled training has ended."""

    task: str


class MeasuringFailed(msgspec.Struct, frozen=True, kw_only=True, tag="measuring_failed"):
    reason: str


class ModelChecked(msgspec.Struct, frozen=True, kw_only=True, tag="model_checked"):
    """It passed, and is installed in the slot that does not serve."""

    deployment: str
    model: str
    health: tuple[Health, ...]


class ModelNotTaken(msgspec.Struct, frozen=True, kw_only=True, tag="model_not_taken"):
    """`refused`: because of what was measured; otherwise it could not be measured."""

    deployment: str
    model: str
    refused: bool
    kind: Reproach
    reason: str
    health: tuple[Health, ...] = ()


class BlobsDamaged(msgspec.Struct, frozen=True, kw_only=True, tag="blobs_damaged"):
    """A blob of the model was not what its SHA-256 says, and was removed."""

    deployment: str
    model: str
    reason: str


Answer: TypeAlias = (
    DeviceMeasured
    | MeasuringFailed
    | DataDescribed
    | DataRefused
    | TrainingProgress
    | Finished
    | TaskFailed
    | DeltaRefused
    | Stopped
    | ModelChecked
    | ModelNotTaken
    | BlobsDamaged
)

Kind = TypeVar("Kind")

_commands: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def encode_line(message: Command | Answer) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def decode_command(line: bytes) -> Command:
    return _decode(_commands, line)


def decode_answer(line: bytes) -> Answer:
    return _decode(_answers, line)


def _decode(decoder: msgspec.json.Decoder[Kind], line: bytes) -> Kind:
    try:
        return decoder.decode(line)
    except msgspec.MsgspecError as exc:
        raise LocalProtocolError(f"between daemon and worker: {exc}: {line[:200]!r}") from exc
