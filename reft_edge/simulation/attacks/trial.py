"""A federation in one process, without a network, in which some devices are hostile.

Everything that an update passes through is the product's: compiled steps in onnxruntime, error feedback and int8,
containers and blobs, the checks of `contributions` and `screening`, and the `Learner` that merges, teaches and
evaluates. What is missing is what does not change the numbers: agents, messages, deadlines. Every device takes part in
every round; nobody is quarantined, so that each round shows what the rules do by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from reft_edge.agent.pacing import Pacer
from reft_edge.agent.trainer import Trainer
from reft_edge.agent.training import train_round
from reft_edge.bundle.manifest import BlobRef, CrossEntropy
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.catalogue import CompiledVariant, Workshop, initial_model, variant_name
from reft_edge.coordinator.contributions import Contribution, check_update, received_weights, update_length
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.evaluation import evaluate
from reft_edge.coordinator.learning import Learner, LearningOptions
from reft_edge.coordinator.screening import outliers
from reft_edge.coordinator.settings import ModelSettings
from reft_edge.data.dataset import Dataset, n_batches
from reft_edge.errors import BundleError
from reft_edge.simulation.attacks.attacks import (
    CLEAN,
    LABELS_FLIPPED,
    UPDATE_ATTACKS,
    HonestUpdate,
    Scene,
    flipped_labels,
)
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, load_digits_split
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Float16, Int8
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.compensation.error_feedback import ErrorFeedback
from reft_edge.wire.messages import TrainingPlan, UpdateManifest, WeightsRef

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors


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


@dataclass
class _Device:
    name: str
    ratio: float
    data: Dataset
    hostile: bool
    feedback: ErrorFeedback = field(default_factory=lambda: ErrorFeedback(Int8()))


class Ground:
    """What all runs of one seed have in common: data, initial model, compiled variants, one trainer each.

    Made once, because compiling takes longer than a run. `directory` holds its blobs.
    """

    def __init__(self, settings: TrialSettings, *, seed: int, directory: Path) -> None:
        self.settings = settings
        self.seed = seed
        self.blobs = BlobStore(directory)
        self.digits = load_digits_split(len(settings.ratios), alpha=settings.alpha, seed=seed)
        self._architecture = ModelSettings(name=settings.model, input_shape=INPUT_SHAPE, n_outputs=N_CLASSES)
        self._model = self.fresh_model()
        self.workshop = Workshop(self._model, self._architecture, importance="magnitude", seed=seed)
        made = {ratio: self.workshop.make(ratio) for ratio in sorted(set(settings.ratios))}
        self.variants: dict[float, CompiledVariant] = {}
        self.trainers: dict[float, Trainer] = {}
        for ratio, (bundle, channels) in made.items():
            self.variants[ratio] = CompiledVariant(
                name=variant_name(ratio),
                ratio=ratio,
                manifest=bundle.manifest,
                manifest_blob=self.blobs.put(bundle.manifest.to_json()),
                channels=channels,
            )
            self.trainers[ratio] = Trainer(bundle, threads=1)
            self.blobs.put(bundle.inference_graph)
        self.parameters = {name for name, _ in self._model.named_parameters()}
        chosen = np.random.default_rng(seed).permutation(len(settings.ratios))[: settings.n_hostile]
        self.hostile = frozenset(int(index) for index in chosen)

    def fresh_model(self) -> torch.nn.Module:
        return initial_model(self._architecture, base_dir=self.blobs.root, seed=self.seed)


def run_trial(ground: Ground, defence: Defence, attack: str) -> TrialResult:
    """All rounds under one of `ATTACKS`. The same arguments give the same result on one platform."""
    return _Trial(ground, defence, attack).run()


class _Trial:
    def __init__(self, ground: Ground, defence: Defence, attack: str) -> None:
        self._ground = ground
        self._settings = ground.settings
        self._attack = attack
        self._blobs = ground.blobs
        self._options = LearningOptions(
            loss=CrossEntropy(),
            aggregation=defence.aggregation,
            distillation=defence.distillation,
            seed=ground.seed,
            public=replace(ground.digits.public, targets=None),  # as in the demo: nobody should wonder
            test=ground.digits.test,
        )
        self._learner = Learner(ground.fresh_model(), self._blobs, self._options, ground.workshop.module)
        self._devices = [self._device(index) for index in range(len(self._settings.ratios))]

    def run(self) -> TrialResult:
        weights = self._learner.save()
        accuracy, merged, rejected = [], [], []
        for number in range(1, self._settings.rounds + 1):
            contributions = self._contributions(weights, number)
            good, bad = self._screen(contributions)
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
            hostile=tuple(device.name for device in self._devices if device.hostile),
        )

    def _device(self, index: int) -> _Device:
        hostile = self._attack != CLEAN and index in self._ground.hostile
        data = self._ground.digits.devices[index]
        if hostile and self._attack == LABELS_FLIPPED and data.targets is not None:
            data = replace(data, targets=flipped_labels(data.targets, N_CLASSES))
        return _Device(name=f"device-{index}", ratio=self._settings.ratios[index], data=data, hostile=hostile)

    def _accuracy(self) -> float:
        return evaluate(self._learner.model, self._ground.digits.test).accuracy or 0.0

    def _contributions(self, weights: BlobRef, number: int) -> list[Contribution]:
        """What all devices send in a round, after they all have trained: hostile ones look at the others first."""
        start = self._learner.read(weights)
        sent = {
            ratio: WeightsRef(
                blob=self._blobs.put(encode_tensors(variant.channels.gather(start), Float16())), codec=Float16()
            )
            for ratio, variant in self._ground.variants.items()
        }
        learned = [self._learn(device, sent[device.ratio], number) for device in self._devices]
        honest = [
            HonestUpdate(channels=self._variant(device).channels, delta=delta)
            for device, delta in zip(self._devices, learned, strict=True)
            if not device.hostile
        ]
        return [
            self._contribution(device, sent[device.ratio], self._lie(device, delta, honest, number))
            for device, delta in zip(self._devices, learned, strict=True)
        ]

    def _learn(self, device: _Device, weights: WeightsRef, number: int) -> dict[str, Array]:
        """Trained minus received."""
        variant = self._variant(device)
        received = received_weights(self._unsent(device, weights), self._blobs)
        trainer = self._ground.trainers[device.ratio]
        seed = 1000 * number + self._devices.index(device)
        trainer.restart(received, seed=seed)
        trained = train_round(
            trainer,
            training=device.data,
            holdout=device.data.take(np.arange(0)),
            plan=self._plan(seed),
            loss=variant.manifest.loss,
            cost=variant.manifest.cost,
            seed=seed,
            pacer=Pacer(None),
            on_step=lambda *_: None,
        )
        return {name: after - received[name] for name, after in trained.tensors.items()}

    def _lie(
        self, device: _Device, delta: dict[str, Array], honest: Sequence[HonestUpdate], number: int
    ) -> dict[str, Array]:
        attack = UPDATE_ATTACKS.get(self._attack)
        if not device.hostile or attack is None:
            return delta
        rng = np.random.default_rng([self._ground.seed, number, self._devices.index(device)])
        channels = self._variant(device).channels
        parameters = self._ground.parameters
        return attack(Scene(channels=channels, delta=delta, honest=honest, parameters=parameters, rng=rng))

    def _contribution(self, device: _Device, weights: WeightsRef, delta: Tensors) -> Contribution:
        """The encoded update. Only honest devices care for what rounding left out of earlier ones."""
        feedback = ErrorFeedback(Int8()) if device.hostile else device.feedback
        update = UpdateManifest(
            blob=self._blobs.put(feedback.encode(delta)), codec=Int8(), training_samples=len(device.data)
        )
        return replace(self._unsent(device, weights), update=update)

    def _screen(self, contributions: Sequence[Contribution]) -> tuple[list[Contribution], tuple[str, ...]]:
        """Those that may be merged, and the names of the others."""
        good = [one for one in contributions if self._passes(one)]
        if self._settings.screened:
            odd = outliers({one.device: update_length(one, self._blobs) for one in good})
            good = [one for one in good if one.device not in odd]
        kept = {one.device for one in good}
        return good, tuple(one.device for one in contributions if one.device not in kept)

    def _passes(self, contribution: Contribution) -> bool:
        device = next(one for one in self._devices if one.name == contribution.device)
        steps = self._settings.local_epochs * n_batches(len(device.data), self._settings.batch_size)
        try:
            check_update(contribution, self._blobs, max_steps=steps)
        except BundleError:
            return False
        return True

    def _plan(self, seed: int) -> TrainingPlan:
        return TrainingPlan(
            local_epochs=self._settings.local_epochs,
            batch_size=self._settings.batch_size,
            learning_rate=self._settings.learning_rate,
            seed=seed,
        )

    def _variant(self, device: _Device) -> CompiledVariant:
        return self._ground.variants[device.ratio]

    def _unsent(self, device: _Device, weights: WeightsRef) -> Contribution:
        """The device's part before it has sent anything: `received_weights` asks only for variant and weights."""
        nothing = UpdateManifest(blob=weights.blob, codec=Int8(), training_samples=len(device.data))
        return Contribution(device=device.name, variant=self._variant(device), weights=weights, update=nothing)
