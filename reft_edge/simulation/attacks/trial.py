"""A federation in one process, without a network, in which some devices are hostile.

Everything that an update passes through is the product's (`simulation.cohort`). Every device takes part in every round;
nobody is quarantined, so that each round shows what the rules do by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.bundle.manifest import BlobRef, CrossEntropy
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.catalogue import initial_model
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.evaluation import evaluate
from reft_edge.coordinator.learning import Learner, LearningOptions
from reft_edge.coordinator.settings import ModelSettings, TrainingSettings
from reft_edge.simulation.attacks.attacks import (
    CLEAN,
    LABELS_FLIPPED,
    UPDATE_ATTACKS,
    HonestUpdate,
    Scene,
    flipped_labels,
)
from reft_edge.simulation.cohort import Cohort, EmulatedDevice, Kit, Learned
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, load_digits_split

if TYPE_CHECKING:
    from reft_edge.coordinator.contributions import Contribution
    from reft_edge.types import Array


class TrialSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One cohort and how it trains. Which devices are hostile is drawn from the seed."""

    model: str = "mlp"
    """Of the zoo. `mlp` has batch norm and trains ten times as fast as `digits_cnn`."""
    ratios: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5)
    """Pruning ratio of each device: as REFT has it, devices hold different parts of the model."""
    n_hostile: int = 2
    alpha: float = 1.0
    """Of the Dirichlet split: the smaller, the fewer classes a device sees."""
    rounds: int = 6
    local_epochs: int = 3
    learning_rate: float = 0.05
    batch_size: int = 32
    screened: bool = True
    """Whether updates far longer than the cohort's are rejected before they are merged, as the product does."""


class Defence(msgspec.Struct, frozen=True, kw_only=True):
    """How the coordinator merges and teaches."""

    aggregation: AggregationSettings = AggregationSettings()
    distillation: DistillationSettings = DistillationSettings()


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a run went, by rounds."""

    accuracy: tuple[float, ...]
    """On the test data, after each round."""
    merged: tuple[float, ...]
    """The same before distilling."""
    rejected: tuple[tuple[str, ...], ...]
    """Devices whose update was not let through, by rounds."""
    hostile: tuple[str, ...]


class Ground:
    """What all runs of one seed have in common: data, initial model, compiled variants.

    Made once, because compiling takes longer than a run. `directory` holds its blobs.
    """

    def __init__(self, settings: TrialSettings, *, seed: int, directory: Path) -> None:
        self.settings = settings
        self.seed = seed
        self.digits = load_digits_split(len(settings.ratios), alpha=settings.alpha, seed=seed)
        architecture = ModelSettings(name=settings.model, input_shape=INPUT_SHAPE, n_outputs=N_CLASSES)
        model = initial_model(architecture, base_dir=directory, seed=seed)
        self.kit = Kit(model, architecture, settings.ratios, seed=seed, directory=directory)
        chosen = np.random.default_rng(seed).permutation(len(settings.ratios))[: settings.n_hostile]
        self.hostile = frozenset(int(index) for index in chosen)


def run_trial(ground: Ground, defence: Defence, attack: str) -> TrialResult:
    """All rounds under one of `ATTACKS`. The same arguments give the same result on one platform."""
    return _Trial(ground, defence, attack).run()


class _Trial:
    def __init__(self, ground: Ground, defence: Defence, attack: str) -> None:
        self._ground = ground
        self._settings = ground.settings
        self._attack = attack
        options = LearningOptions(
            loss=CrossEntropy(),
            aggregation=defence.aggregation,
            distillation=defence.distillation,
            seed=ground.seed,
            public=replace(ground.digits.public, targets=None),  # as in the demo: nobody should wonder
            test=ground.digits.test,
        )
        kit = ground.kit
        self._learner = Learner(kit.fresh_model(), kit.blobs, options, kit.workshop.module)
        devices = [self._device(index) for index in range(len(self._settings.ratios))]
        training = TrainingSettings(
            local_epochs=self._settings.local_epochs,
            batch_size=self._settings.batch_size,
            learning_rate=self._settings.learning_rate,
            delta_codec="none",
        )
        self._cohort = Cohort(kit, devices, training)
        hostile = ground.hostile if attack != CLEAN else frozenset()
        self._hostile = frozenset(device.name for index, device in enumerate(devices) if index in hostile)

    def run(self) -> TrialResult:
        weights = self._learner.save()
        accuracy, merged, rejected = [], [], []
        for number in range(1, self._settings.rounds + 1):
            contributions = self._contributions(weights, number)
            good, bad = self._cohort.screen(contributions, by_length=self._settings.screened)
            rejected.append(bad)
            if good:
                weights = self._learner.merge(weights, good).weights
            merged.append(self._accuracy())
            if good:
                weights = self._learner.distil(weights, good, round_number=number).weights
                self._learner.load(weights)
            accuracy.append(self._accuracy())
        return TrialResult(
            accuracy=tuple(accuracy),
            merged=tuple(merged),
            rejected=tuple(rejected),
            hostile=tuple(device.name for device in self._cohort.devices if device.name in self._hostile),
        )

    def _device(self, index: int) -> EmulatedDevice:
        data = self._ground.digits.devices[index]
        lies = self._attack == LABELS_FLIPPED and index in self._ground.hostile
        if lies and data.targets is not None:
            data = replace(data, targets=flipped_labels(data.targets, N_CLASSES))
        return EmulatedDevice(name=f"device-{index}", ratio=self._settings.ratios[index], data=data)

    def _accuracy(self) -> float:
        return evaluate(self._learner.model, self._ground.digits.test).accuracy or 0.0

    def _contributions(self, weights: BlobRef, number: int) -> list[Contribution]:
        """What all devices send in a round, after they all have trained: hostile ones look at the others first."""
        learned = self._cohort.train(self._cohort.publish(self._learner.read(weights)), number)
        honest = [
            HonestUpdate(channels=self._ground.kit.variants[one.device.ratio].channels, delta=one.delta)
            for one in learned
            if one.device.name not in self._hostile
        ]
        return [
            self._lie(place, one, honest, number)
            if one.device.name in self._hostile
            else self._cohort.send(one, number=number)
            for place, one in enumerate(learned)
        ]

    def _lie(self, place: int, learned: Learned, honest: Sequence[HonestUpdate], number: int) -> Contribution:
        """What a hostile device sends. It does not care for what rounding left out of earlier updates."""
        delta: dict[str, Array] = learned.delta
        if (attack := UPDATE_ATTACKS.get(self._attack)) is not None:
            rng = np.random.default_rng([self._ground.seed, number, place])
            kit = self._ground.kit
            channels = kit.variants[learned.device.ratio].channels
            delta = attack(Scene(channels=channels, delta=delta, honest=honest, parameters=kit.parameters, rng=rng))
        return self._cohort.send_as(learned, delta, number=number)
