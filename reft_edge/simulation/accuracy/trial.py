"""Play one method on one split: the product's parts, in one process (`simulation.cohort`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.bundle.manifest import SGD, CrossEntropy
from reft_edge.coordinator.catalogue import initial_model
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.evaluation import evaluate
from reft_edge.coordinator.learning import Learner, LearningOptions
from reft_edge.coordinator.settings import ModelSettings
from reft_edge.simulation.accuracy.parts import Parts, load_parts
from reft_edge.simulation.accuracy.records import AccuracyRun, AccuracySettings, Central, Federated, Method, Point
from reft_edge.simulation.accuracy.selection import Selection
from reft_edge.simulation.central import CentralOptions, train_centrally
from reft_edge.simulation.cohort import Cohort, EmulatedDevice, Kit

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.coordinator.contributions import Contribution
    from reft_edge.simulation.cohort import Learned

Tell = Callable[[str], None]
"""Hears how a run goes, a line at a time."""

WHOLE = 0.0
"""Pruning ratio of the whole model."""


class Ground:
    """What all methods of one seed and one split share: data and compiled variants. `directory` holds blobs."""

    def __init__(
        self, settings: AccuracySettings, *, data: Path | None, alpha: float, seed: int, directory: Path
    ) -> None:
        self.settings = settings
        self.alpha = alpha
        self.seed = seed
        self.parts: Parts = load_parts(data, settings, alpha=alpha, seed=seed)
        self._directory = directory
        self._architecture = ModelSettings(
            name=settings.model, input_shape=settings.input_shape, n_outputs=self.parts.n_classes
        )
        model = initial_model(self._architecture, base_dir=directory, seed=seed)
        self.whole = self._kit(model, [WHOLE, *settings.ratios])
        self._small: Kit | None = None

    @property
    def small(self) -> Kit:
        """A federation whose whole model is the smallest device's variant."""
        if self._small is None:
            self._small = self._kit(self.whole.workshop.module(max(self.settings.ratios)), [WHOLE])
        return self._small

    def _kit(self, model: nn.Module, ratios: list[float]) -> Kit:
        return Kit(model, self._architecture, ratios, seed=self.seed, directory=self._directory)


def play(ground: Ground, method: Method, *, n_parallel: int = 1, tell: Tell = lambda _: None) -> AccuracyRun:
    """One run. The same arguments give the same accuracies and bytes on one platform."""
    began = time.process_time()
    points = (
        (_central(ground, method, tell),)
        if isinstance(method, Central)
        else _Trial(ground, method, n_parallel, tell).run()
    )
    return AccuracyRun(
        method=method,
        alpha=ground.alpha,
        seed=ground.seed,
        points=points,
        cpu_s=round(time.process_time() - began, 1),
    )


def _central(ground: Ground, method: Central, tell: Tell) -> Point:
    model = ground.whole.fresh_model()
    options = CentralOptions(
        epochs=method.epochs,
        batch_size=method.batch_size,
        learning_rate=method.learning_rate,
        optimizer=SGD(momentum=0.9),
        loss=CrossEntropy(),
        seed=ground.seed,
    )
    figures = train_centrally(
        model,
        ground.parts.private,
        ground.parts.test,
        options,
        progress=lambda done, epochs: tell(f"epoch {done} of {epochs}"),
    )
    return Point(round=1, accuracy=figures.value, merged=figures.value, down_bytes=0.0, up_bytes=0.0, largest_bytes=0)


class _Trial:
    def __init__(self, ground: Ground, method: Federated, n_parallel: int, tell: Tell) -> None:
        self._ground = ground
        self._method = method
        self._tell = tell
        kit = ground.small if method.sizes == "smallest" else ground.whole
        options = LearningOptions(
            loss=CrossEntropy(),
            aggregation=method.aggregation,
            distillation=method.distillation or DistillationSettings(epochs=0),
            seed=ground.seed,
            public=None if method.distillation is None else ground.parts.public,
        )
        self._learner = Learner(kit.fresh_model(), kit.blobs, options, kit.workshop.module)
        devices = [
            EmulatedDevice(name=f"device-{place}", ratio=ratio if method.sizes == "fitted" else WHOLE, data=data)
            for place, (ratio, data) in enumerate(zip(ground.settings.ratios, ground.parts.devices, strict=True))
        ]
        self._cohort = Cohort(kit, devices, method.training, n_parallel=n_parallel)
        self._selection = Selection() if method.selective else None

    def run(self) -> tuple[Point, ...]:
        weights = self._learner.save()
        points: list[Point] = []
        for number in range(1, self._method.rounds + 1):
            learned = self._cohort.train(self._cohort.publish(self._learner.read(weights)), number)
            contributions = self._sent(learned, number)
            good, _ = self._cohort.screen(contributions)
            if good:
                weights = self._learner.merge(weights, good).weights
            merged = accuracy = self._accuracy()
            if good and self._method.distillation is not None:
                weights = self._learner.distil(weights, good, round_number=number).weights
                self._learner.load(weights)
                accuracy = self._accuracy()
            points.append(self._point(number, accuracy, merged, silent=len(learned) - len(contributions)))
            self._tell(f"round {number} of {self._method.rounds}: {accuracy:.4f} ({merged:.4f} merged)")
        return tuple(points)

    def _sent(self, learned: list[Learned], number: int) -> list[Contribution]:
        selection = self._selection
        return [
            self._cohort.send(one, number=number)
            for one in learned
            if selection is None or selection.admits(one.device.name, one.loss_last)
        ]

    def _accuracy(self) -> float:
        return evaluate(self._learner.model, self._ground.parts.test).accuracy or 0.0

    def _point(self, number: int, accuracy: float, merged: float, *, silent: int) -> Point:
        traffic = [device.traffic for device in self._cohort.devices]
        return Point(
            round=number,
            accuracy=accuracy,
            merged=merged,
            down_bytes=sum(one.down_bytes for one in traffic) / len(traffic),
            up_bytes=sum(one.up_bytes for one in traffic) / len(traffic),
            largest_bytes=max(one.down_bytes + one.up_bytes for one in traffic),
            silent=silent,
        )
