"""What the coordinator remembers of single devices: the shared memory of EF21 and EControl (`wire.compensation`).

A device's memory goes up to its last update that was merged, and has that update's name. It is written in the
transaction that merges, so neither a rejected, late or repeated update nor a kill moves it. A task names it; the device
goes on from what it kept with that update, or from nothing, and says which. What a round starts from is noted with its
assignments, because teachers are computed after the merge has moved the memory on.

Memories are blobs, at most `MAX_BYTES` of them: beyond that, devices that were merged longest ago start from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from reft_edge.bundle.container import pack_tensors
from reft_edge.coordinator.contributions import decode_contribution
from reft_edge.coordinator.records import AssignmentRecord, MergedMemory, Remembered
from reft_edge.wire.compensation_names import keeps_memory

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import BlobRef
    from reft_edge.coordinator.contributions import Contribution
    from reft_edge.wire.blobs import BlobStore

MAX_BYTES = 4 * 2**30
"""4 GiB: 600 devices with models of 7 MB in float32."""


def within_limit(memories: Iterable[MergedMemory], *, max_bytes: int = MAX_BYTES) -> dict[str, MergedMemory]:
    """By device, those that are kept: the latest first, as many as fit."""
    kept: dict[str, MergedMemory] = {}
    total = 0
    for memory in sorted(memories, key=lambda one: (-one.round, one.device)):
        total += memory.remembered.tensors.size_bytes
        if total > max_bytes:
            break
        kept[memory.device] = memory
    return kept


def recall(
    assignments: Sequence[AssignmentRecord], memories: Mapping[str, MergedMemory], blobs: BlobStore
) -> list[AssignmentRecord]:
    """The assignments with what their updates may go on from: of the same variant and method, and still here."""
    return [
        msgspec.structs.replace(assignment, memory=_recalled(assignment, memories.get(assignment.device), blobs))
        for assignment in assignments
    ]


def _recalled(assignment: AssignmentRecord, memory: MergedMemory | None, blobs: BlobStore) -> Remembered | None:
    method = assignment.plan.compensation
    if memory is None or not keeps_memory(method) or (memory.variant, memory.method) != (assignment.variant, method):
        return None
    return memory.remembered if blobs.has(memory.remembered.tensors.sha256) else None


def remember(contributions: Iterable[Contribution], blobs: BlobStore) -> dict[str, BlobRef]:
    """Store what to remember once these updates are merged; by device. One at a time. Raises `ContributionError`."""
    return {
        contribution.device: blobs.put(pack_tensors(decode_contribution(contribution, blobs)[1]))
        for contribution in contributions
        if keeps_memory(contribution.compensation)
    }
