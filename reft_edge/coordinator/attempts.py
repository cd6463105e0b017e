"""What one attempt of a round leaves to the next, so that no device trains twice for it and no finished update is lost.

An attempt that found no quorum is planned anew, from the same global weights. A device that is asked for the same work
again keeps its task, and everything that follows comes by itself: its update, which may be here, counts; one that was
announced is pulled on; and an agent that is told its own task again goes on training, or says again how it ended. Who
refused, failed or sent a useless update gets a new task, because an agent answers a known one as it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from reft_edge.coordinator.records import AssignmentRecord, RoundKey
from reft_edge.coordinator.rounds import Participant, Standing

if TYPE_CHECKING:
    from reft_edge.coordinator.parts import RunParts
    from reft_edge.wire.messages import TrainingPlan

_FINISHED = frozenset({Standing.OFFERED, Standing.UPDATED})
_AT_WORK = frozenset({Standing.ASKED, Standing.ACCEPTED})


def left_over(parts: RunParts, key: RoundKey) -> list[AssignmentRecord]:
    """Assignments of the attempt before `key` that their devices may go on with, by device."""
    if key.attempt == 1:
        return []
    before = msgspec.structs.replace(key, attempt=key.attempt - 1)
    barred = {record.device for record in parts.store.quarantined()}
    return [
        record
        for record in parts.store.assignments(before)
        if record.device not in barred and parts.fleet[record.device].announcement and _is_of_use(record, parts)
    ]


def take_over(
    planned: Iterable[AssignmentRecord], left: Iterable[AssignmentRecord], plan_of: Callable[[str], TrainingPlan]
) -> list[AssignmentRecord]:
    """What an attempt asks for, by device: what is `planned`, or the same task as before.

    `plan_of`: what a device is asked to do now; settings may have changed between two processes. Who has finished keeps
    its variant, whatever it would be given now, and has a part even while it is away.
    """
    taken = {record.device: record for record in planned}
    for record in left:
        if record.plan != plan_of(record.device):
            continue
        if is_finished(record):
            taken[record.device] = record
        elif record.device in taken and taken[record.device].variant == record.variant:
            taken[record.device] = msgspec.structs.replace(record, standing=Standing.ASKED.value)
    return [taken[device] for device in sorted(taken)]


def is_finished(record: AssignmentRecord) -> bool:
    """Whether the device has trained for this task."""
    return Standing(record.standing) in _FINISHED


def participants(assignments: Iterable[AssignmentRecord]) -> dict[str, Participant]:
    """The parts that devices begin a round with, by device."""
    return {
        record.device: Participant(standing=Standing(record.standing), update=record.update) for record in assignments
    }


def _is_of_use(record: AssignmentRecord, parts: RunParts) -> bool:
    """Whether there is a way from here to the update."""
    standing = Standing(record.standing)
    if standing in _AT_WORK:
        return True
    if standing not in _FINISHED or record.update is None:
        return False
    update = parts.store.update(record.task, record.update)
    if update is None:
        return False
    return update.state == "offered" or (update.state == "received" and parts.blobs.has(record.update))
