"""What coordinator and device say to each other about models that are served: roll-out, roll-back, condition.

A `Deploy` is retained on the device's topic `deployment`, so that a device that was away finds it. It names the files
of one version that fit this device; the device fetches them as it fetches all blobs, measures each by itself, takes the
better one and says so in its `Condition`, which is retained on the topic `condition`. Nothing is ever pushed into a
device that serves: what does not pass its check is never switched to.

Beside that the condition tells how the device is between rounds: temperature, power, how many predictions failed, and,
where its owner allows it, counts of what it predicts. Counts only: no input, no single prediction and no time of one
leaves the device.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from reft_edge.bundle.manifest import BlobRef, Count
from reft_edge.wire.messages import SCHEMA, Digest, Name, Seconds, Text, decode_message

Precision: TypeAlias = Literal["float32", "int8"]

CONFIDENCE_BINS = 10
"""Of equal width over 0 to 1. Of a classifier's confidence, which is at least 1 / n_classes."""

MAX_COUNTED_CLASSES = 1000
"""Of a model with more, classes from this one on are counted together, in the last entry."""

Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """One ONNX file as it travels: a zstandard frame (`bundle.container.compress`)."""

    blob: BlobRef
    size_bytes: Count
    """Of the ONNX file itself."""
    precision: Precision
    test_metric: float | None = None
    """Accuracy or mean squared error on the federation's test data, where it has some."""


class HealthRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a device's own check must show before it serves a version. None: not asked."""

    max_metric_drop: Share = 0.05
    """By how much the accuracy on the device's holdout may be below that of what it serves now; of a mean squared
    error, by which share it may be above."""
    min_accuracy: Share | None = None
    """On the device's holdout, also where it serves nothing yet."""
    max_int8_drop: Share = 0.01
    """int8 is taken where it is faster and no more than this below float32, by the same measure."""
    max_latency_s: Seconds | None = None
    """95th percentile of the time of one sample."""
    max_memory_bytes: Count | None = None
    """Peak resident memory of the process that was checked with."""
    min_holdout_samples: Count = 10
    """With fewer, accuracies say nothing and are not compared."""


class Deploy(msgspec.Struct, frozen=True, kw_only=True, tag="deploy"):
    """Retained on `deployment`: serve this version, if it passes your check."""

    deployment: Name
    """One roll-out. The same one again starts nothing anew, unless it comes with another `model`: a device that refused
    one for its latency or its memory is offered the next smaller."""
    version: Name
    """What a person calls it: the run whose model it is, or a name that was given."""
    model: Text
    """Which of the version's models this device gets, for example `global` or `variant-0.50`."""
    files: Annotated[tuple[ModelFile, ...], Meta(min_length=1, max_length=2)]
    """One for each precision."""
    rules: HealthRules = HealthRules()
    classes: tuple[Text, ...] = ()
    """Names in the order of the model's outputs; the device maps its holdout's to these. Empty: indices."""
    broadcast: bool = False
    """As in `Task`."""
    sequence: Count = 0
    """As in `Task`: rises with all that a coordinator says."""
    schema: int = SCHEMA


class Rollback(msgspec.Struct, frozen=True, kw_only=True, tag="rollback"):
    """Retained on `deployment`: undo that roll-out. A device that serves something else does nothing."""

    deployment: Name
    reason: Text = ""
    sequence: Count = 0
    schema: int = SCHEMA


DeploymentMessage: TypeAlias = Deploy | Rollback
"""What the coordinator says on `deployment`."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What a device measured of one file."""

    precision: Precision
    holdout_samples: Count = 0
    metric: float | None = None
    """Accuracy or mean squared error on the device's holdout; None where it has none."""
    metric_before: float | None = None
    """Of what it served until then, on the same samples."""
    latency_p50_s: Seconds
    """Of one sample at a time; so the other percentiles."""
    latency_p95_s: Seconds
    latency_p99_s: Seconds
    peak_memory_bytes: Count
    """Resident memory of the process that was checked with."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """A version in one of the device's two slots."""

    deployment: Name
    version: Name
    model: Text
    precision: Precision
    sha256: Digest
    """Of the ONNX file, not of the blob that it came in."""


AttemptState: TypeAlias = Literal["fetching", "checking", "serving", "refused", "failed", "rolled_back"]
"""`refused`: the device's check was not passed. `failed`: it could not be done. Both leave in place what was served."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the deployment that the device heard of last."""

    deployment: Name
    model: Text = ""
    """The one that it was offered then."""
    state: AttemptState
    kind: Literal["", "accuracy", "latency", "memory", "data", "bundle", "crashed", "storage"] = ""
    """What a refusal or a failure is about."""
    reason: Text = ""
    health: Annotated[tuple[Health, ...], Meta(max_length=2)] = ()


class PredictionCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What the served version has predicted since it was switched to. All but the errors is for the owner to allow:
    [serving] report. Where it is not, only they are told, when there are some."""

    version: Name
    predictions: Count = 0
    """Samples."""
    errors: Count = 0
    """Requests that were answered with an error of ours, and attempts to load the version that failed; wrong input is
    not counted."""
    classes: Annotated[tuple[Count, ...], Meta(max_length=MAX_COUNTED_CLASSES)] = ()
    """How often each class was the most likely one; empty for regression."""
    confidence: Annotated[tuple[Count, ...], Meta(max_length=CONFIDENCE_BINS)] = ()
    """How often the most likely class had a probability in each bin (`CONFIDENCE_BINS`)."""
    latency_p95_s: Seconds | None = None


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """How the board is. None: it does not tell."""

    temperature_celsius: float | None = None
    throttled: bool | None = None
    battery_share: Share | None = None
    """Charge, from 0 to 1."""
    on_battery: bool | None = None


class Condition(msgspec.Struct, frozen=True, kw_only=True, tag="condition"):
    """Retained on `condition`."""

    serving: Served | None = None
    previous: Served | None = None
    """What a roll-back would return to."""
    attempt: Attempt | None = None
    counts: PredictionCounts | None = None
    vitals: Vitals | None = None
    schema: int = SCHEMA


_deployment: msgspec.json.Decoder[DeploymentMessage] = msgspec.json.Decoder(DeploymentMessage)
_condition: msgspec.json.Decoder[Condition] = msgspec.json.Decoder(Condition)


def decode_deployment(payload: bytes) -> DeploymentMessage:
    """Raises `RemoteProtocolError`."""
    return decode_message(_deployment, payload)


def decode_condition(payload: bytes) -> Condition:
    """Raises `RemoteProtocolError`."""
    return decode_message(_condition, payload)
