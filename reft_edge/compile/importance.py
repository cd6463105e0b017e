"""How much each channel matters: the order in which channels go.

An importance is a function from a group of coupled channels, and the weights that would go with each channel, to one
score a channel; channels with low scores go first. Scores do not depend on the pruning ratio, so the variants of one
model are nested: a smaller one holds a subset of what a larger one holds, and merging averages over more devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from reft_edge.compile.dependencies import ChannelGroup
    from reft_edge.types import Array, Tensors


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The channels of one group, as an importance sees them.

    A channel here is what can go alone: for a grouped convolution, one channel of each group.
    """

    name: str
    """The layer that produces the channels."""
    n_channels: int
    weights: Mapping[str, Array]
    """For each trained tensor, (n_channels, n_entries): the entries that go with each channel."""
    seed: int


Importance = Callable[[Candidates], "Array"]
"""Scores (n_channels,), finite, higher is kept longer."""


def magnitude(candidates: Candidates) -> Array:
    """Group L2 norm, divided by its mean over the group (DepGraph, arXiv 2301.12900, section 3.3)."""
    total = np.zeros(candidates.n_channels)
    for entries in candidates.weights.values():
        total += np.einsum("ij,ij->i", entries, entries, dtype=np.float64)
    norm = np.sqrt(total)
    return norm / max(float(norm.mean()), 1e-30)


def random(candidates: Candidates) -> Array:
    """A random order, the same for the same seed and layer: each seed trains another sub-network."""
    digest = hashlib.sha256(f"{candidates.seed} {candidates.name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return rng.random(candidates.n_channels)


def first(candidates: Candidates) -> Array:
    """Channels in their order, the first kept longest (HeteroFL, arXiv 2010.01264, section 3)."""
    return 1.0 - np.arange(candidates.n_channels) / candidates.n_channels


IMPORTANCES: Mapping[str, Importance] = {"magnitude": magnitude, "random": random, "first": first}


def find_importance(importance: str | Importance) -> Importance:
    """The importance of that name, or the function itself. Raises `ConfigError`."""
    if callable(importance):
        return importance
    if importance not in IMPORTANCES:
        raise ConfigError(f"unknown importance {importance!r}; known are {', '.join(IMPORTANCES)}, or pass a function")
    return IMPORTANCES[importance]


def score(group: ChannelGroup, tensors: Tensors, trained: set[str], importance: Importance, seed: int) -> Array:
    """Scores of the group's units, float64 (n_units,). Raises `ModelError` when the importance gives something else."""
    weights: dict[str, Array] = {}
    for part in group.slices:
        if part.tensor not in trained:
            continue
        order = np.argsort(part.units, kind="stable")
        counts = np.bincount(part.units, minlength=group.n_units)
        if not len(order) or counts.min() != counts.max():
            continue  # a part of the group only: nothing to compare its channels by
        lines = np.moveaxis(tensors[part.tensor], part.axis, 0)[part.positions[order]]
        entries = lines.reshape(group.n_units, -1)
        key = f"{part.tensor}, axis {part.axis}" if part.tensor in weights else part.tensor
        weights[key] = entries
    candidates = Candidates(name=group.name, n_channels=group.n_units, weights=weights, seed=seed)
    scores = np.asarray(importance(candidates), np.float64)
    if scores.shape != (group.n_units,) or not np.isfinite(scores).all():
        raise ModelError(
            f"importance of {group.name!r}: expected {group.n_units} finite scores, got an array of {scores.shape}"
        )
    return scores
