"""From a received update to tensors that may be merged: read, decode, check.

Nothing of an update is believed before it has passed here: names, shapes, dtypes and finiteness (by the codec), its
norm against the weights that it changes, and what it does to statistics and counters, which no norm covers. What fails
is a `BundleError` whose text is the reason that the store keeps. How an update compares with the others of its round is
`screening`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.bundle.bundle import weights_limit
from reft_edge.bundle.container import container_limit, unpack_tensors
from reft_edge.bundle.manifest import CrossEntropy
from reft_edge.coordinator.screening import UpdateLength
from reft_edge.errors import BundleError
from reft_edge.wire.codec_names import codec_text
from reft_edge.wire.codecs import decode_tensors
from reft_edge.wire.compensation.methods import decode_update
from reft_edge.wire.compensation_names import Compensation, ErrorFeedbackOptions

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import BlobRef, Manifest
    from reft_edge.coordinator.catalogue import CompiledVariant
    from reft_edge.types import Array, Tensors
    from reft_edge.wire.blobs import BlobStore
    from reft_edge.wire.codec_names import Codec
    from reft_edge.wire.messages import UpdateManifest, WeightsRef

DEFAULT_COMPENSATION = ErrorFeedbackOptions()

MAX_NORM_RATIO = 10.0
"""An update may be this many times as long (Euclidean norm over all parameters) as the weights it started from.
Useful updates are shorter than the weights; a diverged training is longer by orders of magnitude."""

MIN_WEIGHTS_NORM = 1.0
"""Models that start at zero would otherwise accept no update."""

VARIANCE_SUFFIX = "running_var"
"""How torch calls the buffer of every batch norm that holds variances; a negative one gives NaN for every input."""

MAX_STATISTIC = 1e12
"""Of a running mean or variance: that of values with a standard deviation of a million. Unscaled inputs stay below;
one infinite activation in inference takes the whole model with it."""

MAX_LOSS = float(np.finfo(np.float32).max)
"""Devices compute in float32."""


class ContributionError(BundleError):
    """One device's contribution cannot be read or must not be used; the text says why."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(reason)
        self.device = device


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One device's part in a merge: which variant it trained, from which weights, and its update."""

    device: str
    variant: CompiledVariant
    weights: WeightsRef
    update: UpdateManifest
    """With no more training samples than the device was planned with, whatever it says now."""
    compensation: Compensation = DEFAULT_COMPENSATION
    """What the device was asked to encode with."""
    memory: BlobRef | None = None
    """What the update goes on from, where that method has a memory on both sides; None: from nothing."""


def received_weights(contribution: Contribution, blobs: BlobStore) -> dict[str, Array]:
    """The weights as the device decoded them: what its update was trained from. Raises `ContributionError`."""
    with _blamed_on(contribution):
        data = blobs.read(contribution.weights.blob)
        return decode_tensors(data, contribution.weights.codec, contribution.variant.manifest.tensors)


def read_update(contribution: Contribution, blobs: BlobStore) -> dict[str, Array]:
    """The update's tensors, of the variant's names and shapes. Raises `ContributionError`."""
    return decode_contribution(contribution, blobs)[0]


def decode_contribution(contribution: Contribution, blobs: BlobStore) -> tuple[dict[str, Array], dict[str, Array]]:
    """The update's tensors, and what to remember of the device if they are merged. Raises `ContributionError`."""
    manifest = contribution.variant.manifest
    memory: Tensors | None = None
    with _blamed_on(contribution):
        if contribution.memory is not None:
            memory = unpack_tensors(blobs.read(contribution.memory), max_bytes=memory_limit(manifest))[0]
        data = blobs.read(contribution.update.blob)
        return decode_update(contribution.compensation, data, contribution.update.codec, manifest.tensors, memory)


def memory_limit(manifest: Manifest) -> int:
    """`max_bytes` for `unpack_tensors` on what is remembered of a device: float32, at most one for each tensor."""
    return container_limit(sum(4 * spec.n_elements for spec in manifest.tensors))


def unwanted_reason(update: UpdateManifest, manifest: Manifest, codec: Codec, *, memory: str | None = None) -> str:
    """Why an announced update need not even be pulled; empty when it may be useful.

    `memory`: the update that the task names for this one to go on from.
    """
    if update.codec != codec:
        return f"the update is encoded as {codec_text(update.codec)!r}; {codec_text(codec)!r} was asked for"
    if update.memory not in (None, memory):
        return "the update goes on from another one than the task names"
    limit = weights_limit(manifest)
    if update.blob.size_bytes > limit:
        return f"the update has {update.blob.size_bytes} bytes; at most {limit} can be of use"
    if update.training_samples < 1:
        return "the update was trained on no samples"
    return _absurd_metric(update, manifest)


def check_update(contribution: Contribution, blobs: BlobStore, *, max_steps: int) -> None:
    """Raise `BundleError`, with the reason, for an update that must not be merged.

    `max_steps`: training steps that the task asked for at most; no counter may have run further.
    """
    delta = read_update(contribution, blobs)
    manifest = contribution.variant.manifest
    weights = received_weights(contribution, blobs)
    length = _norm(delta, manifest)
    if length == 0:
        raise BundleError("the update changes no parameter; the device has not trained")
    limit = MAX_NORM_RATIO * max(MIN_WEIGHTS_NORM, _norm(weights, manifest))
    if length > limit:
        raise BundleError(f"the update's norm {length:.3g} is above {limit:.3g}; training has diverged")
    for spec in manifest.buffers:
        _check_buffer(spec.name, weights[spec.name], delta[spec.name], max_steps)


def update_length(contribution: Contribution, blobs: BlobStore) -> UpdateLength:
    """How long a checked update is, for the comparison with its cohort. Raises `ContributionError`."""
    manifest = contribution.variant.manifest
    n_parameters = sum(spec.n_elements for spec in manifest.parameters)
    return UpdateLength(_norm(read_update(contribution, blobs), manifest), n_parameters)


def trained_weights(contribution: Contribution, blobs: BlobStore) -> dict[str, Array]:
    """The weights that the device ended with: received plus update. Raises `ContributionError`."""
    weights = received_weights(contribution, blobs)
    delta = read_update(contribution, blobs)
    return {name: (weights[name] + delta[name]).astype(weights[name].dtype) for name in weights}


@contextmanager
def _blamed_on(contribution: Contribution) -> Iterator[None]:
    """Say whose contribution could not be read."""
    try:
        yield
    except BundleError as exc:
        raise ContributionError(contribution.device, str(exc)) from exc


def _absurd_metric(update: UpdateManifest, manifest: Manifest) -> str:
    """Why a metric that a device reports cannot be one; empty if all can. They are shown, and nothing depends on them,
    but a device that says so is broken or lies."""
    classifies = isinstance(manifest.loss, CrossEntropy)
    limits = {
        "loss_first": MAX_LOSS,
        "loss_last": MAX_LOSS,
        "holdout_metric_before": 1.0 if classifies else MAX_LOSS,
        "holdout_metric_after": 1.0 if classifies else MAX_LOSS,
    }
    for name, limit in limits.items():
        value: float | None = getattr(update, name)
        if value is not None and not 0 <= value <= limit:
            return f"the device reports {name} = {value:.6g}; possible is 0 to {limit:.6g}"
    return ""


def _check_buffer(name: str, before: Array, delta: Array, max_steps: int) -> None:
    """Raise `BundleError` for a change that training cannot have made."""
    if delta.dtype.kind == "b":
        if delta.any():
            raise BundleError(f"the update changes {name!r}, a mask, which no training does")
    elif delta.dtype.kind in "iu":
        if delta.size and not 0 <= int(delta.min()) <= int(delta.max()) <= max_steps:
            raise BundleError(
                f"the update moves the counter {name!r} by {int(delta.min())} to {int(delta.max())}; "
                f"the task has {max_steps} steps"
            )
    else:
        _check_statistic(name, before, delta)


def _check_statistic(name: str, before: Array, delta: Array) -> None:
    """Constants among the buffers, which do not change, are not judged."""
    changed = delta != 0
    after = before[changed].astype(np.float64) + delta[changed]
    if not after.size:
        return
    if np.abs(after).max() > MAX_STATISTIC:
        raise BundleError(f"the update brings {name!r} to {after[np.abs(after).argmax()]:.3g}; training has diverged")
    if name.endswith(VARIANCE_SUFFIX) and after.min() < 0:
        raise BundleError(f"the update brings a variance in {name!r} to {after.min():.3g}; it cannot be negative")


def _norm(tensors: Tensors, manifest: Manifest) -> float:
    """Euclidean norm over all parameters; statistics and counters are not in it."""
    squares = (float(np.square(tensors[spec.name].astype(np.float64)).sum()) for spec in manifest.parameters)
    return float(np.sqrt(sum(squares)))
