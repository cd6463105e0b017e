"""The round that a process works on: its state, and what was decided when it was planned."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import msgspec

from reft_edge.coordinator import rounds
from reft_edge.coordinator.contributions import Contribution
from reft_edge.coordinator.records import AssignmentRecord, RoundKey, UpdateRecord
from reft_edge.wire.messages import UpdateManifest

if TYPE_CHECKING:
    from reft_edge.coordinator.catalogue import CompiledVariant


@dataclass(kw_only=True)
class OpenRound:
    """The round that is worked on. `state` is replaced with every event; the rest is fixed when it is planned."""

    key: RoundKey
    state: rounds.Round
    assignments: dict[str, AssignmentRecord]
    """By device."""
    variants: dict[str, CompiledVariant]
    """By name, those in use."""
    started_at: float
    """When it was planned first: tasks may be older than the attempt."""
    resumed: bool = False
    """Whether a process before this one began it."""

    def has_task(self, device: str, task: str) -> bool:
        """Whether `task` is the device's task in this round."""
        return device in self.assignments and self.assignments[device].task == task

    def contribution(self, record: UpdateRecord) -> Contribution:
        """What a device's update changes. The round has been published."""
        assignment = self.assignments[record.device]
        if assignment.weights is None:
            raise ValueError(f"assignment {assignment.task!r} has not been published")
        goes_on = record.manifest.memory is not None and assignment.memory is not None
        return Contribution(
            device=record.device,
            variant=self.variants[assignment.variant],
            weights=assignment.weights,
            update=_as_planned(record.manifest, assignment),
            compensation=assignment.plan.compensation,
            memory=assignment.memory.tensors if goes_on and assignment.memory is not None else None,
        )

    def max_steps(self, record: UpdateRecord) -> int:
        """Training steps that the samples of an update can have taken."""
        plan = self.assignments[record.device].plan
        return plan.local_epochs * ceil(record.manifest.training_samples / plan.batch_size)


def _as_planned(update: UpdateManifest, assignment: AssignmentRecord) -> UpdateManifest:
    """An update with no more samples than its device was planned with: they decide how much it counts.

    A folder that grows meanwhile makes an honest device say more; then it counts for what it had announced.
    """
    plan, n_steps = assignment.plan, assignment.prediction.steps
    planned = n_steps // plan.local_epochs * plan.batch_size
    return msgspec.structs.replace(update, training_samples=min(update.training_samples, planned))
