"""From what is known of devices to the assignments of a round.

Brings together the fleet (who is there), the store (how earlier predictions turned out), the catalogue (what variants
cost) and the plan; what a device is asked to do beside its variant is the same for all.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_edge.bundle.manifest import CrossEntropy
from reft_edge.coordinator.attempts import take_over
from reft_edge.coordinator.events import Excluded, PlannedDevice
from reft_edge.coordinator.fleet import Device, unfit_reason
from reft_edge.coordinator.holdings import Held, what_is_held
from reft_edge.coordinator.planning import Assignment, plan
from reft_edge.coordinator.policies import Ladder
from reft_edge.coordinator.prediction import Correction, Option, Workload, correct
from reft_edge.coordinator.prediction import Device as PlanDevice
from reft_edge.coordinator.records import AssignmentRecord, Prediction, RoundKey, UpdateState
from reft_edge.wire.compensation.methods import codec_in_round
from reft_edge.wire.messages import Measured, TrainingPlan

if TYPE_CHECKING:
    from reft_edge.coordinator.parts import RunParts
    from reft_edge.coordinator.settings import FederationSettings

OUT_OF_MEMORY = "out_of_memory"

TAKEN_OVER = "goes on with its task of the attempt before"

BELIEVED: tuple[UpdateState, ...] = ("received", "merged", "late")
"""Updates whose measurements correct predictions: what came with rejected ones or with second answers does not."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who does what in a round, and who takes no part, and why."""

    assignments: list[AssignmentRecord]
    devices: list[PlannedDevice]
    excluded: list[Excluded]


class Planner:
    """Plans the rounds of one run."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._workload = workload_of(parts.settings)
        self._ladder = Ladder(parts.catalogue.ladder(parts.settings.planning.ratios), self._price)

    def plan(self, key: RoundKey, devices: Sequence[Device], left: Sequence[AssignmentRecord] = ()) -> Plan:
        """One assignment for each device that can train something. Compiles the variants that it looks at.

        `left`: of an attempt before. Who goes on with that, or is done with it, keeps its task.
        """
        excluded: list[Excluded] = []
        candidates: list[PlanDevice] = []
        corrections = self._corrections()
        held, bases = self._held()
        quarantined = {record.device: record.reason for record in self._parts.store.quarantined()}
        for device in devices:
            if device.device in quarantined:
                excluded.append(Excluded(device=device.device, reason=f"in quarantine: {quarantined[device.device]}"))
                continue
            reason = self._unfit(device)
            if reason or device.announcement is None:
                excluded.append(Excluded(device=device.device, reason=reason or "it has not told what it can do"))
                continue
            candidates.append(
                PlanDevice(
                    device=device.device,
                    profile=device.announcement.profile,
                    training_samples=device.announcement.training_samples,
                    holdout_samples=device.announcement.holdout_samples,
                    correction=corrections.get(device.device, Correction()),
                    graphs_of=held[device.device].ratio if device.device in held else None,
                    has_base=device.device in held and held[device.device].weights in bases,
                )
            )
        planned = plan(
            candidates,
            workload=self._workload,
            ladder=self._ladder,
            policy=self._settings.planning.policy,
            max_variants=self._settings.planning.max_variants,
        )
        excluded += [Excluded(device=item.device, reason=item.reason) for item in planned if item.option is None]
        new = [self._assignment(key, item) for item in planned if item.option is not None]
        assignments = take_over(new, left, lambda device: self._training_plan(key, device))
        reasons = {key.task(item.device): item.reason for item in planned}
        taking_part = {record.device for record in assignments}
        return Plan(
            assignments=assignments,
            devices=[self._describe(record, reasons.get(record.task, TAKEN_OVER)) for record in assignments],
            excluded=[item for item in excluded if item.device not in taking_part],
        )

    def _price(self, ratio: float) -> Option:
        variant = self._parts.catalogue.variant(ratio)
        return Option.of(variant.manifest, ratio=ratio, workload=self._workload)

    def _unfit(self, device: Device) -> str:
        model = self._settings.model
        if device.announcement is None:
            return ""
        return unfit_reason(
            device.announcement,
            input_shape=model.input_shape,
            n_outputs=model.outputs,
            classification=isinstance(model.loss_function, CrossEntropy),
        )

    def _held(self) -> tuple[dict[str, Held], set[str]]:
        """What devices have of earlier rounds, and the weights (SHA-256) that deltas may start from."""
        parts = self._parts
        if self._settings.training.delta_encoding is None:
            return what_is_held(parts.store.history(parts.run)), set()
        bases = {weights.blob.sha256 for weights in parts.store.bases(parts.run).values()}
        return what_is_held(parts.store.history(parts.run)), bases

    def _corrections(self) -> dict[str, Correction]:
        """What the rounds of this run so far say about each device."""
        predictions: dict[str, Prediction] = {}
        failed: dict[str, list[float]] = defaultdict(list)
        for assignment in self._parts.store.history(self._parts.run):
            predictions[assignment.task] = assignment.prediction
            if assignment.failure == OUT_OF_MEMORY:
                failed[assignment.device].append(assignment.ratio)
        measured: dict[str, list[tuple[Prediction, Measured]]] = defaultdict(list)
        for update in self._parts.store.updates(self._parts.run):
            if update.state in BELIEVED:
                measured[update.device].append((predictions[update.task], update.measured))
        return {
            device: correct(measured[device], failed_ratios=failed[device])
            for device in measured.keys() | failed.keys()
        }

    def _assignment(self, key: RoundKey, item: Assignment) -> AssignmentRecord:
        if item.option is None or item.prediction is None:
            raise ValueError(f"device {item.device!r} takes no part")
        return AssignmentRecord(
            task=key.task(item.device),
            device=item.device,
            variant=self._parts.catalogue.variant(item.option.ratio).name,
            ratio=item.option.ratio,
            prediction=item.prediction,
            plan=self._training_plan(key, item.device),
        )

    def _training_plan(self, key: RoundKey, device: str) -> TrainingPlan:
        """What a device is asked to do with its variant: the same in every attempt of a round."""
        training = self._settings.training
        return TrainingPlan(
            local_epochs=training.local_epochs,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            learning_rate_schedule=training.schedule,
            seed=device_seed(self._settings.seed, key.number, device),
            update_codec=codec_in_round(training.update_encoding, training.compensation_method, key.number),
            compensation=training.compensation_method,
        )

    def _describe(self, record: AssignmentRecord, reason: str) -> PlannedDevice:
        variant = self._parts.catalogue.named(record.variant)
        announcement = self._parts.fleet[record.device].announcement
        n_samples = 0 if announcement is None else announcement.training_samples * self._workload.local_epochs
        return PlannedDevice(
            device=record.device,
            variant=variant.name,
            ratio=variant.ratio,
            parameters=variant.manifest.cost.parameters,
            forward_macs=variant.manifest.cost.forward_macs,
            share=variant.channels.share,
            prediction=record.prediction,
            predicted_round_s=record.prediction.round_s,
            training_flops=float(n_samples * variant.manifest.cost.step_flops_per_sample),
            reason=reason,
        )


def workload_of(settings: FederationSettings) -> Workload:
    """What a round of this federation asks of a device."""
    training = settings.training
    return Workload(
        local_epochs=training.local_epochs,
        batch_size=training.batch_size,
        deadline_s=settings.deadline_s,
        weights_codec=training.weights_encoding,
        update_codec=training.update_encoding,
        delta_codec=training.delta_encoding,
        compensation=training.compensation_method,
    )


def device_seed(seed: int, round_number: int, device: str) -> int:
    """The seed of a device's batches and dropout in a round: the same for the same federation, else independent."""
    digest = hashlib.sha256(f"{seed}/{round_number}/{device}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**62
