"""Control messages: readable JSON, typed, versioned and bounded.

Each message is a frozen struct with a `type` tag. Unknown fields are ignored and missing optional fields take their
default, so that a newer peer may add fields. A message that lacks a required field, breaks a bound or is too large
raises `RemoteProtocolError`, which the receiver logs and drops. Blocks of blobs are binary and are in `wire.blocks`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from reft_edge.bundle.manifest import MAX_AXES, BlobRef, Count
from reft_edge.errors import RemoteProtocolError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire.codec_names import Codec, Float32, Int8
from reft_edge.wire.compensation_names import Compensation, ErrorFeedbackOptions

SCHEMA = 1

MAX_MESSAGE_BYTES = 96 * 1024
"""96 KiB: a control message is read whole, and must fit the 128 KiB packet limit of our broker configuration."""

Name: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
"""A federation, a device or a task. The patterns end with \\Z, because $ lets a line break through."""
Digest: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""SHA-256 of a blob."""
TransferName: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
"""Names a transfer in block headers and topics: the first 16 digits of the blob's SHA-256."""
Text: TypeAlias = Annotated[str, Meta(max_length=2000)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
"""A duration, or Unix time: until the year 33658. Beyond it sums of them lose their meaning."""
Shape: TypeAlias = Annotated[tuple[Count, ...], Meta(max_length=MAX_AXES)]


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Retained on `status`; the offline form is the last will."""

    online: bool
    version: Text = ""
    state: Literal["idle", "fetching", "training", "uploading", "offline"] = "offline"
    task: Name | None = None
    schema: int = SCHEMA


class ProfileAnnouncement(msgspec.Struct, frozen=True, kw_only=True, tag="profile"):
    """Retained on `profile`: what the device can do, and how much data it has (never which)."""

    profile: DeviceProfile
    training_samples: Count
    holdout_samples: Count = 0
    input_shape: Shape = ()
    n_classes: Count | None = None
    """Number of classes the device's data knows; None for regression."""
    schema: int = SCHEMA


class WeightsRef(msgspec.Struct, frozen=True, kw_only=True):
    """Weights as they travel down: a container blob and the codec of its tensors."""

    blob: BlobRef
    codec: Codec = Float32()
    broadcast: bool = True
    """Whether this blob lies at the broker when the task's others do; with a `delta`, few devices need it."""


class WeightsDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Another way to the same weights, for a device that still holds those of an earlier task. See `wire.deltas`."""

    blob: BlobRef
    codec: Codec
    base: Digest
    """Of the whole weights blob that it starts from, which the device fetched, or put together in the same way."""
    values: Digest
    """Of what base and delta must give (`wire.deltas.values_digest`)."""
    broadcast: bool = True
    """As in `WeightsRef`."""


class TrainingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a device trains in one round."""

    local_epochs: Annotated[int, Meta(ge=1, le=10_000)]
    batch_size: Annotated[int, Meta(ge=1, le=65_536)]
    learning_rate: Annotated[float, Meta(gt=0, le=1000)]
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine`: from `learning_rate` to 0 over the steps of this round (Loshchilov and Hutter, arXiv 1608.03983)."""
    seed: Annotated[int, Meta(ge=0, le=2**62)]
    update_codec: Codec = Int8()
    compensation: Compensation = ErrorFeedbackOptions()
    """What becomes of what the codec leaves out."""


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="task"):
    """Retained on `task`: one round's work for one device. An empty payload clears it."""

    task: Name
    """Unique for (federation run, round, device)."""
    round: Count
    run: Name
    """The coordinator's run; state that a device keeps between rounds (quantization residuals) belongs to one run."""
    bundle: BlobRef
    """The manifest's JSON as a blob; graphs are named in it."""
    weights: WeightsRef
    """What the device trains from, and what its update is the difference to."""
    delta: WeightsDelta | None = None
    """Fewer bytes to the same weights. Where anything about it is in doubt, the device fetches `weights`."""
    memory: Digest | None = None
    """The device's last merged update, where the plan's compensation has a memory that coordinator and device share:
    what is remembered here goes up to that one. A device that does not remember the same starts from nothing."""
    plan: TrainingPlan
    deadline: Seconds
    """Unix time after which an update counts as late."""
    classes: tuple[Text, ...] = ()
    """Class names in the order of the model's outputs; a device maps its own to these. Empty: indices."""
    broadcast: bool = False
    """Whether the blocks of these blobs lie retained on `blob/<transfer>/<index>`; else ask on `up`."""
    sequence: Count = 0
    """Rises with all that a coordinator says on `task`. A device refuses a lower one than it has obeyed: that is an old
    message, which somebody plays again, or a broker that was restarted."""
    schema: int = SCHEMA


class Close(msgspec.Struct, frozen=True, kw_only=True, tag="close"):
    """Retained on `task` in place of a task: the run has ended, the worker may go and the spool may be cleared."""

    run: Name
    sequence: Count = 0
    """As in `Task`."""
    schema: int = SCHEMA


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    task: Name
    schema: int = SCHEMA


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The device cannot or will not do this task. Nothing was trained."""

    task: Name
    reason: Text
    schema: int = SCHEMA


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    task: Name
    state: Literal["fetching", "training", "uploading"]
    steps_done: Count = 0
    steps_total: Count = 0
    loss: float | None = None
    schema: int = SCHEMA


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The device tried and could not finish."""

    task: Name
    kind: Literal["out_of_memory", "crashed", "data", "bundle", "timeout", "diverged", "storage"]
    reason: Text
    schema: int = SCHEMA


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the round really took on the device; the planner corrects its predictions with it."""

    download_s: Seconds
    start_s: Seconds
    """From the worker having the bundle to its first training step: process start if cold, session creation."""
    training_s: Seconds
    steps: Count
    peak_memory_bytes: Count
    """Peak resident memory of the worker."""
    down_bytes: Count = 0
    """Of the blobs that were fetched for this task; those that lay in the spool are not in it."""
    temperature_celsius: float | None = None
    throttled: bool | None = None


class UpdateManifest(msgspec.Struct, frozen=True, kw_only=True):
    """An update: trained minus received weights, as a container blob."""

    blob: BlobRef
    codec: Codec
    memory: Digest | None = None
    """The task's, if the update goes on from it; None if from nothing."""
    training_samples: Count
    holdout_samples: Count = 0
    loss_first: float | None = None
    """Mean training loss of the first local epoch; `loss_last` of the last."""
    loss_last: float | None = None
    holdout_metric_before: float | None = None
    """Accuracy (classification) or mean squared error (regression) of the received weights on the device's holdout."""
    holdout_metric_after: float | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Training has finished and the update lies ready to be pulled; repeated until a receipt comes."""

    task: Name
    round: Count
    update: UpdateManifest
    measured: Measured
    schema: int = SCHEMA


Report: TypeAlias = Accepted | Refused | Progress | Failed | Done
"""What a device says on `report`."""

TaskMessage: TypeAlias = Task | Close
"""What the coordinator says on `task`."""


class BlobOffer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """Answer to `Want`: how the blob is cut. The receiver checks every block by its short hash."""

    sha256: Digest
    size_bytes: Count
    block_bytes: Annotated[int, Meta(ge=1024, le=256 * 1024)]
    transfer: TransferName
    part: Count = 0
    """Long hash lists travel in parts; this is part `part` of `parts`."""
    parts: Annotated[int, Meta(ge=1, le=4096)] = 1
    block_hashes: Annotated[str, Meta(max_length=80_000)]
    """Eight bytes a block (BLAKE2b-64), base64, of this part."""


class Want(msgspec.Struct, frozen=True, kw_only=True, tag="want"):
    """The receiver asks how a blob is cut (before its first block)."""

    sha256: Digest


class RequestBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """The receiver asks for blocks: ranges of (first, count)."""

    transfer: TransferName
    ranges: Annotated[tuple[tuple[Count, Count], ...], Meta(min_length=1, max_length=64)]


class Receipt(msgspec.Struct, frozen=True, kw_only=True, tag="receipt"):
    """The receiver has the whole blob, checked and on its disk."""

    sha256: Digest


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone"):
    """The sender does not hold this blob."""

    sha256: Digest


TransferMessage: TypeAlias = Want | BlobOffer | RequestBlocks | Receipt | Gone
"""Transfer control, beside the blocks on `up` and `down`."""

Kind = TypeVar("Kind")

_encoder = msgspec.json.Encoder(order="deterministic")
_status: msgspec.json.Decoder[Status] = msgspec.json.Decoder(Status)
_profile: msgspec.json.Decoder[ProfileAnnouncement] = msgspec.json.Decoder(ProfileAnnouncement)
_task: msgspec.json.Decoder[TaskMessage] = msgspec.json.Decoder(TaskMessage)
_report: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
_transfer: msgspec.json.Decoder[TransferMessage] = msgspec.json.Decoder(TransferMessage)


def encode(message: msgspec.Struct) -> bytes:
    """A message as JSON bytes, the same bytes for equal messages."""
    return _encoder.encode(message)


def decode_status(payload: bytes) -> Status:
    return decode_message(_status, payload)


def decode_profile(payload: bytes) -> ProfileAnnouncement:
    return decode_message(_profile, payload)


def decode_task(payload: bytes) -> TaskMessage:
    return decode_message(_task, payload)


def decode_report(payload: bytes) -> Report:
    return decode_message(_report, payload)


def decode_transfer(payload: bytes) -> TransferMessage:
    return decode_message(_transfer, payload)


def decode_message(decoder: msgspec.json.Decoder[Kind], payload: bytes) -> Kind:
    """A message of `decoder`'s kind. Raises `RemoteProtocolError` for what is none."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"message of {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"message is not valid: {exc}") from exc
