"""What goes down in a round: weights for each variant, and a task for each device.

Weights are gathered from the global tensors by the variant's channel map and encoded once a variant; blobs are named by
content, so publishing a round again after a restart changes nothing. A variant that several devices train is laid at
the broker; a single device asks the coordinator.

From a variant's second round on there is also a delta to the weights of its last closed round (`wire.deltas`). All its
devices get the same weights, whichever way they take. Of weights and delta, what several devices should need is laid at
the broker. A round that is planned again after it found no quorum starts from the same base and gives the same weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator.holdings import Held, graph_blobs
from reft_edge.coordinator.records import AssignmentRecord, RoundKey
from reft_edge.errors import BundleError
from reft_edge.wire.broadcast import may_broadcast
from reft_edge.wire.codecs import decode_tensors, encode_tensors
from reft_edge.wire.deltas import encode_delta, rebuild, values_digest
from reft_edge.wire.messages import Task, WeightsDelta, WeightsRef

if TYPE_CHECKING:
    from reft_edge.coordinator.catalogue import CompiledVariant
    from reft_edge.types import Tensors
    from reft_edge.wire.blobs import BlobStore
    from reft_edge.wire.codec_names import Codec

BROADCAST_FROM = 2
"""Devices that share a blob before it is laid at the broker."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a round's weights follow from."""

    codec: Codec
    """Of deltas."""
    bases: Mapping[str, WeightsRef]
    """Variant -> the weights of its last closed round."""
    held: Mapping[str, Held]
    """By device."""


def publish_weights(
    assignments: Sequence[AssignmentRecord],
    variants: Mapping[str, CompiledVariant],
    global_tensors: Tensors,
    *,
    codec: Codec,
    blobs: BlobStore,
    chain: Chain | None = None,
) -> list[AssignmentRecord]:
    """Store the weights of every variant in use; returns the assignments with their blobs named.

    Without a `chain` there are no deltas.
    """
    published: list[AssignmentRecord] = []
    for name in sorted({assignment.variant for assignment in assignments}):
        devices = [assignment for assignment in assignments if assignment.variant == name]
        tensors = variants[name].channels.gather(global_tensors)
        weights, delta = encode_weights(name, variants[name], tensors, codec=codec, blobs=blobs, chain=chain)
        if chain is not None and delta is not None:
            weights, delta = _share(weights, delta, [chain.held.get(assignment.device) for assignment in devices])
        published += [
            msgspec.structs.replace(
                assignment,
                bundle=variants[name].manifest_blob,
                weights=weights,
                delta=delta,
                broadcast=len(devices) >= BROADCAST_FROM,
            )
            for assignment in devices
        ]
    order = {assignment.task: place for place, assignment in enumerate(assignments)}
    return sorted(published, key=lambda assignment: order[assignment.task])


def encode_weights(
    name: str, variant: CompiledVariant, tensors: Tensors, *, codec: Codec, blobs: BlobStore, chain: Chain | None
) -> tuple[WeightsRef, WeightsDelta | None]:
    """A variant's weights, and the delta to them where there is one that saves bytes."""
    base = None if chain is None else chain.bases.get(name)
    if chain is not None and base is not None and base.codec == codec:
        try:
            followed = _follow(base, variant, tensors, delta_codec=chain.codec, blobs=blobs)
        except BundleError as exc:  # our disk has lost the base, or weights have moved beyond what floats can say
            _log.warning("variant %s: its weights travel whole: %s", name, exc)
        else:
            if followed[1].blob.size_bytes < followed[0].blob.size_bytes:
                return followed
    rng = np.random.default_rng(int(values_digest(tensors)[:16], 16))
    return WeightsRef(blob=blobs.put(encode_tensors(tensors, codec, rng=rng)), codec=codec), None


def _follow(
    base: WeightsRef, variant: CompiledVariant, wanted: Tensors, *, delta_codec: Codec, blobs: BlobStore
) -> tuple[WeightsRef, WeightsDelta]:
    """Weights that follow from `base` by a delta. Raises `BundleError`."""
    specs = variant.manifest.tensors
    held = decode_tensors(blobs.read(base.blob), base.codec, specs)
    data = encode_delta(wanted, held, delta_codec)
    weights = rebuild(held, data, delta_codec=delta_codec, weights_codec=base.codec, specs=specs)
    delta = WeightsDelta(
        blob=blobs.put(data), codec=delta_codec, base=base.blob.sha256, values=values_digest(weights.tensors)
    )
    return WeightsRef(blob=blobs.put(weights.blob), codec=base.codec), delta


def _share(weights: WeightsRef, delta: WeightsDelta, held: Sequence[Held | None]) -> tuple[WeightsRef, WeightsDelta]:
    """Have each lie at the broker if several devices, by what they hold, should fetch it."""
    having = [None if one is None else one.weights for one in held]
    n_delta = sum(sha256 == delta.base for sha256 in having)
    n_whole = sum(sha256 not in (delta.base, weights.blob.sha256) for sha256 in having)
    return (
        msgspec.structs.replace(weights, broadcast=n_whole >= BROADCAST_FROM),
        msgspec.structs.replace(delta, broadcast=n_delta >= BROADCAST_FROM),
    )


def blobs_of(assignment: AssignmentRecord, variant: CompiledVariant) -> list[BlobRef]:
    """Every blob that the device may need for its task. The manifest's initial weights are not among them."""
    return [*graph_blobs(variant), *(way.blob for way in (assignment.weights, assignment.delta) if way is not None)]


def broadcast_blobs(assignments: Sequence[AssignmentRecord], variants: Mapping[str, CompiledVariant]) -> list[BlobRef]:
    """What the broker shall hold for these assignments. Larger blobs are left to be pulled."""
    chosen: dict[str, BlobRef] = {}
    for assignment in assignments:
        if assignment.broadcast:
            ways = (assignment.weights, assignment.delta)
            refs = graph_blobs(variants[assignment.variant])
            refs += [way.blob for way in ways if way is not None and way.broadcast]
            chosen.update((ref.sha256, ref) for ref in refs if may_broadcast(ref))
    return list(chosen.values())


def make_task(
    assignment: AssignmentRecord, key: RoundKey, *, deadline: float, classes: tuple[str, ...], sequence: int
) -> Task:
    """The message for a device. `assignment` has been published. `sequence` is above that of all messages before."""
    if assignment.bundle is None or assignment.weights is None:
        raise ValueError(f"assignment {assignment.task!r} has not been published")
    return Task(
        task=assignment.task,
        round=key.number,
        run=key.run,
        bundle=assignment.bundle,
        weights=assignment.weights,
        delta=assignment.delta,
        memory=None if assignment.memory is None else assignment.memory.update,
        plan=assignment.plan,
        deadline=deadline,
        classes=classes,
        broadcast=assignment.broadcast,
        sequence=sequence,
    )
