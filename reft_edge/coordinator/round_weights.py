"""A round's weights on our disk: written when it is published, and again when the disk has lost them.

Everything that a round needs follows from four things: the global model that it starts from, the variants' recipes,
what devices sent, and what is remembered of them. Of these the first and the last two cannot be derived again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_edge.coordinator.holdings import what_is_held
from reft_edge.coordinator.publishing import Chain, publish_weights
from reft_edge.coordinator.rounds import Phase
from reft_edge.errors import BundleError, FederationError

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import BlobRef
    from reft_edge.coordinator.contributions import Contribution
    from reft_edge.coordinator.open_round import OpenRound
    from reft_edge.coordinator.parts import RunParts
    from reft_edge.coordinator.records import AssignmentRecord


def starting_model(parts: RunParts) -> BlobRef:
    """The global tensors that the open round started with: they are replaced when it has distilled.

    Raises `FederationError` when our disk has lost them.
    """
    weights = parts.store.weights(parts.run)
    try:
        parts.blobs.read(weights)
    except BundleError as exc:
        raise model_is_lost(weights, parts) from exc
    return weights


def model_is_lost(weights: BlobRef, parts: RunParts) -> FederationError:
    path = parts.blobs.path(weights.sha256)
    return FederationError(
        f"our disk has lost the global model, {path}: bring the file back from a copy to go on, or give --new-run to "
        "begin anew"
    )


def write_weights(current: OpenRound, parts: RunParts) -> list[AssignmentRecord]:
    """The assignments with their blobs named. Doing it again changes nothing, and brings back what was lost."""
    codec = parts.settings.training.delta_encoding
    chain = None
    if codec is not None:  # the open round's own assignments say nothing yet
        held = what_is_held(parts.store.history(parts.run))
        chain = Chain(codec=codec, bases=parts.store.bases(parts.run), held=held)
    return publish_weights(
        list(current.assignments.values()),
        current.variants,
        parts.learner.read(starting_model(parts)),
        codec=parts.settings.training.weights_encoding,
        blobs=parts.blobs,
        chain=chain,
    )


def mend(current: OpenRound, contribution: Contribution, parts: RunParts) -> bool:
    """Write anew what is missing of a contribution, where it follows from something else; whether that was all."""
    has = parts.blobs.has
    sent = [contribution.update.blob, *([] if contribution.memory is None else [contribution.memory])]
    derived = [contribution.weights.blob, contribution.variant.manifest.inference_graph]
    lost = [ref for ref in derived if not has(ref.sha256)]
    if not lost or not all(has(ref.sha256) for ref in sent):
        return False
    parts.catalogue.mend()
    if current.state.phase is not Phase.EVALUATING:  # then the round's start is known no more
        write_weights(current, parts)
    return all(has(ref.sha256) for ref in lost)
