"""From a received update to tensors that may be merged: read, decode, check.

Nothing of an update is believed before it has passed here: names, shapes, dtypes and finiteness (by the codec), and its
norm against the weights that it changes. What fails is a `BundleError` whose text is the reason that the store keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.bundle.bundle import weights_limit
from reft_edge.errors import BundleError
from reft_edge.wire.codecs import decode_tensors

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import Manifest
    from reft_edge.coordinator.catalogue import CompiledVariant
    from reft_edge.types import Array, Tensors
    from reft_edge.wire.blobs import BlobStore
    from reft_edge.wire.messages import UpdateManifest, WeightsCodec, WeightsRef

MAX_NORM_RATIO = 10.0
"""An update may be this many times as long (Euclidean norm over all parameters) as the weights it started from.
Useful updates are shorter than the weights; a diverged training is longer by orders of magnitude."""

MIN_WEIGHTS_NORM = 1.0
"""Models that start at zero would otherwise accept no update."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One device's part in a merge: which variant it trained, from which weights, and its update."""

    device: str
    variant: CompiledVariant
    weights: WeightsRef
    update: UpdateManifest


def received_weights(contribution: Contribution, blobs: BlobStore) -> dict[str, Array]:
    """The weights as the device decoded them: what its update was trained from. Raises `BundleError`."""
    data = blobs.read(contribution.weights.blob)
    return decode_tensors(data, contribution.weights.codec, contribution.variant.manifest.tensors)


def read_update(contribution: Contribution, blobs: BlobStore) -> dict[str, Array]:
    """The update's tensors, of the variant's names and shapes. Raises `BundleError`."""
    data = blobs.read(contribution.update.blob)
    return decode_tensors(data, contribution.update.codec, contribution.variant.manifest.tensors)


def unwanted_reason(update: UpdateManifest, manifest: Manifest, codec: WeightsCodec) -> str:
    """Why an announced update need not even be pulled; empty when it may be useful."""
    if update.codec != codec:
        return f"the update is encoded as {update.codec}; {codec} was asked for"
    limit = weights_limit(manifest)
    if update.blob.size_bytes > limit:
        return f"the update has {update.blob.size_bytes} bytes; at most {limit} can be of use"
    if update.training_samples < 1:
        return "the update was trained on no samples"
    return ""


def check_update(contribution: Contribution, blobs: BlobStore) -> None:
    """Raise `BundleError`, with the reason, for an update that must not be merged."""
    delta = read_update(contribution, blobs)
    manifest = contribution.variant.manifest
    length = _norm(delta, manifest)
    limit = MAX_NORM_RATIO * max(MIN_WEIGHTS_NORM, _norm(received_weights(contribution, blobs), manifest))
    if length > limit:
        raise BundleError(f"the update's norm {length:.3g} is above {limit:.3g}; training has diverged")


def trained_weights(contribution: Contribution, blobs: BlobStore) -> dict[str, Array]:
    """The weights that the device ended with: received plus update. Raises `BundleError`."""
    weights = received_weights(contribution, blobs)
    delta = read_update(contribution, blobs)
    return {name: (weights[name] + delta[name]).astype(weights[name].dtype) for name in weights}


def _norm(tensors: Tensors, manifest: Manifest) -> float:
    """Euclidean norm over all parameters; statistics and counters are not in it."""
    squares = (float(np.square(tensors[spec.name].astype(np.float64)).sum()) for spec in manifest.parameters)
    return float(np.sqrt(sum(squares)))
