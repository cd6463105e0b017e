"""What the benchmark compares, and what it measured: the structs of its JSON file.

A run names its method with all of its settings, so a row whose method has changed is measured again.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.settings import TrainingSettings

DataKind: TypeAlias = Literal["cifar10", "pictures", "digits"]
"""CIFAR-10 in its binary form, pictures in folders by class, or scikit-learn's digits."""

Sizes: TypeAlias = Literal["fitted", "whole", "smallest"]
"""What devices train: each what its capacity admits, the whole model whatever their capacity, or all what the least of
them can."""


class AccuracySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What all methods have in common; a file holds runs of one of these."""

    data: DataKind
    model: str
    """Of the zoo."""
    input_shape: tuple[int, ...]
    n_private: int
    """Training samples, over all devices. Digits have what they have: 1,079."""
    n_public: int
    """Unlabelled samples of the coordinator, disjoint from the others."""
    n_test: int
    ratios: tuple[float, ...]
    """Pruning ratio of each device: what its capacity admits."""


class Federated(msgspec.Struct, frozen=True, kw_only=True, tag="federated"):
    """A method with devices."""

    name: str
    rounds: int
    sizes: Sizes
    training: TrainingSettings
    aggregation: AggregationSettings = AggregationSettings()
    distillation: DistillationSettings | None = None
    """None: no public data, so neither distillation nor batch-norm statistics from it."""
    selective: bool = False
    """Devices send only what `selective.Selection` lets through."""


class Central(msgspec.Struct, frozen=True, kw_only=True, tag="central"):
    """The whole model on the pooled private data: a ceiling."""

    name: str
    epochs: int
    batch_size: int
    learning_rate: float


Method: TypeAlias = Federated | Central


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """After a round. Bytes are totals since the start, of blobs as they travel, graphs and manifests included."""

    round: int
    accuracy: float
    """Of the global model on the test data."""
    merged: float
    """The same before distilling."""
    down_bytes: float
    up_bytes: float
    """Mean over the devices."""
    largest_bytes: int
    """Down and up, of the device with the most."""
    silent: int = 0
    """Devices that sent nothing in this round."""

    @property
    def total_bytes(self) -> float:
        """Down and up, mean over the devices."""
        return self.down_bytes + self.up_bytes


class AccuracyRun(msgspec.Struct, frozen=True, kw_only=True):
    """One method, once."""

    method: Method
    alpha: float
    """Of the Dirichlet split."""
    seed: int
    """Of data, split and initial weights."""
    points: tuple[Point, ...]
    """By rounds; central training has one, without bytes."""
    cpu_s: float
    """Of the emulating process."""

    @property
    def last(self) -> Point:
        return self.points[-1]


def missing(
    methods: tuple[Method, ...], runs: list[AccuracyRun], *, alphas: tuple[float, ...], seeds: int
) -> list[tuple[Method, float, int]]:
    """What is to be measured, in the order in which it says most soonest: seed by seed, the easier split first."""
    done = {(msgspec.json.encode(run.method), run.alpha, run.seed) for run in runs}
    wanted = [(method, alpha, seed) for alpha in alphas for seed in range(seeds) for method in methods]
    return [(m, alpha, seed) for m, alpha, seed in wanted if (msgspec.json.encode(m), alpha, seed) not in done]


def outdated(methods: tuple[Method, ...], runs: list[AccuracyRun]) -> list[AccuracyRun]:
    """Runs of methods that are not among `methods` any more, or have other settings now."""
    known = {msgspec.json.encode(method) for method in methods}
    return [run for run in runs if msgspec.json.encode(run.method) not in known]
