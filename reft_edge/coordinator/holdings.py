"""What devices still hold of earlier rounds, as far as that can be known here: it decides what has to travel.

A device keeps the graphs of its last task and the weights that it trained from (`agent.session`). It may have lost
them, and decides itself what it fetches; what is known here says which blobs are laid at the broker, and what a round
is expected to carry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from reft_edge.bundle.manifest import BlobRef

if TYPE_CHECKING:
    from reft_edge.coordinator.catalogue import CompiledVariant
    from reft_edge.coordinator.records import AssignmentRecord


class Held(NamedTuple):
    """What one device has."""

    ratio: float
    """Of the variant whose graphs they are."""
    weights: str
    """SHA-256 of the whole weights blob of the task that it answered last."""


def what_is_held(history: Iterable[AssignmentRecord]) -> dict[str, Held]:
    """By device, from a run's assignments, oldest first. Who has announced an update had all that its task names."""
    held: dict[str, Held] = {}
    for assignment in history:
        if assignment.update is not None and assignment.weights is not None:
            held[assignment.device] = Held(assignment.ratio, assignment.weights.blob.sha256)
    return held


def graph_blobs(variant: CompiledVariant) -> list[BlobRef]:
    """What does not change from round to round."""
    return [variant.manifest_blob, variant.manifest.training_graph, variant.manifest.inference_graph]


def download(assignment: AssignmentRecord, variant: CompiledVariant, held: Held | None) -> list[BlobRef]:
    """The blobs that a device has to fetch for its task. The assignment has been published."""
    refs = [] if held is not None and held.ratio == assignment.ratio else graph_blobs(variant)
    weights, delta = assignment.weights, assignment.delta
    if weights is None or (held is not None and held.weights == weights.blob.sha256):
        return refs
    by_delta = delta is not None and held is not None and held.weights == delta.base
    return [*refs, delta.blob if delta is not None and by_delta else weights.blob]
