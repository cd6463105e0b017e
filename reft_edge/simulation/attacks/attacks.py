"""What a hostile device sends in place of what it learned.

An attack changes the trainable parameters only: statistics and counters stay those of an honest training, because
checks find odd ones before any rule is asked. Hostile devices know everything, also what the honest ones send this
round, and may act together.

Pure numpy. `flipped_labels` is another kind of attack: the device trains as it should, on wrong labels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from reft_edge.compile.channels import ChannelMap
    from reft_edge.types import Array, IntArray, Tensors

LITTLE = 1.5
"""Standard deviations that `a_little` moves away from the honest mean. Its paper's formula (the most with which hostile
devices still have enough honest ones behind them to look like a majority) gives 0 for 2 of 10, so this is more than a
careful attacker would dare."""


@dataclass(frozen=True, kw_only=True)
class HonestUpdate:
    """What one device that is not hostile sends: its variant's map and its update."""

    channels: ChannelMap
    delta: Tensors


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a hostile device knows."""

    channels: ChannelMap
    """Of its own variant."""
    delta: Tensors
    """What it learned itself, as an honest device would."""
    honest: Sequence[HonestUpdate]
    parameters: Collection[str]
    """Names of the trainable tensors."""
    rng: np.random.Generator


Attack: TypeAlias = Callable[[Scene], "dict[str, Array]"]
"""The tensors that the device sends, in the shapes and dtypes of its own update."""


def scaled(factor: float) -> Attack:
    """The device's own update, `factor` times: model replacement (Bagdasaryan et al., arXiv 1807.00459),
    and with -1 the sign flip."""
    return lambda scene: _changed(scene, lambda _, values: values * factor)


def gaussian(scene: Scene) -> dict[str, Array]:
    """Noise as long as what the device learned: its length tells nothing."""
    parameters = [scene.delta[name] for name in scene.parameters]
    n_entries = sum(values.size for values in parameters)
    deviation = np.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in parameters) / n_entries)
    return _changed(scene, lambda _, values: scene.rng.normal(0.0, deviation, values.shape))


def a_little(scene: Scene) -> dict[str, Array]:
    """Collusion: all hostile devices send mean minus `LITTLE` standard deviations of the honest updates, entry by entry
    over those that hold it (Baruch et al., "A Little Is Enough", arXiv 1902.06156)."""

    def lie(name: str, values: Array) -> Array:
        shape = scene.channels.global_shapes[name]
        placed = np.full((len(scene.honest), *shape), np.nan)
        for row, update in zip(placed, scene.honest, strict=True):
            update.channels.put(name, update.delta[name], into=row)
        held = ~np.isnan(placed)
        count = np.maximum(held.sum(axis=0), 1)
        mean = np.where(held, placed, 0.0).sum(axis=0) / count
        deviation = np.sqrt(np.where(held, np.square(placed - mean), 0.0).sum(axis=0) / count)
        own = scene.channels.indices[name]
        result: Array = (mean - LITTLE * deviation).reshape(-1)[own].reshape(values.shape)
        return result

    return _changed(scene, lie)


def flipped_labels(labels: IntArray, n_classes: int) -> IntArray:
    """Class c becomes n_classes - 1 - c (as in Fang et al., arXiv 1911.11815)."""
    return n_classes - 1 - labels


UPDATE_ATTACKS: Mapping[str, Attack] = {
    "sign flipped": scaled(-1.0),
    "flipped x3.5": scaled(-3.5),
    "scaled x10": scaled(10.0),
    "scaled x100": scaled(100.0),
    "random": gaussian,
    "a little": a_little,
}
"""`flipped x3.5` stays just below the length from which screening calls an update an outlier."""

LABELS_FLIPPED = "labels flipped"
CLEAN = "clean"
ATTACKS = (CLEAN, *UPDATE_ATTACKS, LABELS_FLIPPED)


def _changed(scene: Scene, lie: Callable[[str, Array], Array]) -> dict[str, Array]:
    return {
        name: lie(name, values).astype(values.dtype) if name in scene.parameters else values
        for name, values in scene.delta.items()
    }
