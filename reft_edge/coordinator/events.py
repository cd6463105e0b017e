"""What the coordinator tells whoever watches: one struct an event, JSON lines for programs, rich lines for people.

`event` is the tag of each JSON object. Fields may be added; a reader ignores events and fields it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from reft_edge.coordinator.records import Prediction
from reft_edge.wire.messages import Measured


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base of all events. Nothing else derives from the structs below."""

    at: float | None = None
    """Unix seconds; set as the event is written to the run's log."""


class Started(Event, frozen=True, kw_only=True, tag="started"):
    run: str
    federation: str
    resumed: bool
    """Whether this run was begun by an earlier process."""
    round: int
    """The round that is worked on first."""
    rounds: int
    model: str
    parameters: int
    """Of the unpruned model; `global_bytes` are its tensors in float32."""
    global_bytes: int


class Waiting(Event, frozen=True, kw_only=True, tag="waiting"):
    """For devices to announce themselves, or for a device to take part again."""

    devices: int
    needed: int


class DeviceSeen(Event, frozen=True, kw_only=True, tag="device"):
    device: str
    online: bool
    state: str = ""
    profile: str = ""
    training_samples: int = 0


class PlannedDevice(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    variant: str
    ratio: float
    parameters: int
    forward_macs: int
    share: float
    """Its parameters over the unpruned model's."""
    prediction: Prediction
    predicted_round_s: float
    training_flops: float = 0.0
    """Floating-point operations of all its training steps in the round; 0 where they were not counted."""
    reason: str = ""
    """Why this variant."""


class Excluded(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    reason: str


class Planned(Event, frozen=True, kw_only=True, tag="planned"):
    round: int
    attempt: int
    devices: list[PlannedDevice]
    excluded: list[Excluded]


class RoundStarted(Event, frozen=True, kw_only=True, tag="round_started"):
    round: int
    attempt: int
    devices: list[str]
    deadline: float
    resumed: bool = False


class RoundExtended(Event, frozen=True, kw_only=True, tag="round_extended"):
    """The deadline has passed without the quorum, and is moved."""

    round: int
    deadline: float


class RoundCollected(Event, frozen=True, kw_only=True, tag="round_collected"):
    """No update comes into the round any more; those that came are looked at beside each other and merged."""

    round: int
    counted: int
    asked: int
    late: list[str]
    """Devices that were asked and have neither sent an update nor refused nor failed."""


class DeviceProgress(Event, frozen=True, kw_only=True, tag="progress"):
    round: int
    device: str
    state: str
    """accepted, fetching, training, uploading, refused, failed."""
    steps_done: int = 0
    steps_total: int = 0
    loss: float | None = None
    reason: str = ""


class UpdateSeen(Event, frozen=True, kw_only=True, tag="update"):
    """An update's fate: received, late, rejected, duplicate or damaged. One that was received may be rejected later."""

    round: int
    device: str
    state: str
    reason: str = ""
    kept: str = ""
    """Path of the note beside a rejected update that was kept."""
    up_bytes: int = 0
    """The update's blob as it travelled."""
    training_samples: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    holdout_metric_before: float | None = None
    holdout_metric_after: float | None = None
    measured: Measured | None = None


class Quarantined(Event, frozen=True, kw_only=True, tag="quarantined"):
    """A device gets no more tasks until a person lifts it."""

    device: str
    reason: str


class RoundMerged(Event, frozen=True, kw_only=True, tag="round_merged"):
    round: int
    updates: int
    accuracy: float | None = None
    loss: float | None = None
    mse: float | None = None
    accuracy_before_batch_norm: float | None = None
    """Straight after the weighted mean; the others are with batch-norm statistics from public data."""


class Distilling(Event, frozen=True, kw_only=True, tag="distilling"):
    round: int
    epoch: int
    epochs: int
    loss: float


class RoundDistilled(Event, frozen=True, kw_only=True, tag="distilled"):
    round: int
    teachers: int
    kept_epoch: int
    """0: the merged model was better on held-out public data, and stays."""
    accuracy: float | None = None
    loss: float | None = None
    mse: float | None = None


class DeviceBytes(msgspec.Struct, frozen=True, kw_only=True):
    """What a device's link carried for one round, in bytes of blobs."""

    device: str
    down_bytes: int
    up_bytes: int
    full_model_bytes: int
    """One way, unpruned, float32: what plain federated averaging would send."""


class RoundClosed(Event, frozen=True, kw_only=True, tag="round_closed"):
    round: int
    seconds: float
    counted: int
    asked: int
    traffic: list[DeviceBytes]
    accuracy: float | None = None
    mse: float | None = None


class RoundFailed(Event, frozen=True, kw_only=True, tag="round_failed"):
    round: int
    attempt: int
    reason: str


class Exported(Event, frozen=True, kw_only=True, tag="exported"):
    name: str
    path: str
    values: dict[str, float]


class Finished(Event, frozen=True, kw_only=True, tag="finished"):
    run: str
    rounds: int
    accuracy: float | None
    mse: float | None
    updates: dict[str, int]
    """Number of updates in each state."""
    directory: str


Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener for those who do not listen."""
