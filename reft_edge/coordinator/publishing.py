"""What goes down in a round: weights for each variant, and a task for each device.

Weights are gathered from the global tensors by the variant's channel map and encoded once a variant; blobs are named by
content, so publishing a round again after a restart changes nothing. A variant that several devices train is laid at
the broker; a single device asks the coordinator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator.records import AssignmentRecord, RoundKey
from reft_edge.wire.broadcast import may_broadcast
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.messages import Task, WeightsRef

if TYPE_CHECKING:
    from reft_edge.coordinator.catalogue import CompiledVariant
    from reft_edge.types import Tensors
    from reft_edge.wire.blobs import BlobStore
    from reft_edge.wire.codec_names import Codec

BROADCAST_FROM = 2
"""Devices that share a variant before its blobs are laid at the broker."""


def publish_weights(
    assignments: Sequence[AssignmentRecord],
    variants: Mapping[str, CompiledVariant],
    global_tensors: Tensors,
    *,
    codec: Codec,
    blobs: BlobStore,
) -> list[AssignmentRecord]:
    """Store the weights of every variant in use; returns the assignments with their blobs named."""
    n_devices = Counter(assignment.variant for assignment in assignments)
    weights: dict[str, WeightsRef] = {}
    for name in n_devices:
        tensors = variants[name].channels.gather(global_tensors)
        weights[name] = WeightsRef(blob=blobs.put(encode_tensors(tensors, codec)), codec=codec)
    return [
        msgspec.structs.replace(
            assignment,
            bundle=variants[assignment.variant].manifest_blob,
            weights=weights[assignment.variant],
            broadcast=n_devices[assignment.variant] >= BROADCAST_FROM,
        )
        for assignment in assignments
    ]


def blobs_of(assignment: AssignmentRecord, variant: CompiledVariant) -> list[BlobRef]:
    """Every blob that the device needs for its task. The manifest's initial weights are not among them."""
    manifest = variant.manifest
    refs = [variant.manifest_blob, manifest.training_graph, manifest.inference_graph]
    return refs if assignment.weights is None else [*refs, assignment.weights.blob]


def broadcast_blobs(assignments: Sequence[AssignmentRecord], variants: Mapping[str, CompiledVariant]) -> list[BlobRef]:
    """What the broker shall hold for these assignments. Larger blobs are left to be pulled."""
    chosen: dict[str, BlobRef] = {}
    for assignment in assignments:
        if assignment.broadcast:
            refs = blobs_of(assignment, variants[assignment.variant])
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
        plan=assignment.plan,
        deadline=deadline,
        classes=classes,
        broadcast=assignment.broadcast,
        sequence=sequence,
    )
