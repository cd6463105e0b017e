"""Divide a labelled data set among emulated devices, evenly or as unevenly as real ones.

`dirichlet` gives each device its own mix of classes, as in Hsu, Qi and Brown (arXiv 1909.06335, section 3): the smaller
`alpha`, the fewer classes a device sees. `iid` gives everybody the same mix. Both are exact covers in parts of equal
size: every sample goes to exactly one device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import ConfigError

if TYPE_CHECKING:
    from reft_edge.types import Array, IntArray


def iid(n_samples: int, n_devices: int, *, seed: int) -> list[IntArray]:
    """Sorted sample indices of each device; sizes differ by one at most."""
    _check_sizes(n_samples, n_devices)
    order = np.random.default_rng(seed).permutation(n_samples)
    return [np.sort(part) for part in np.array_split(order, n_devices)]


def dirichlet(labels: IntArray, n_devices: int, *, alpha: float, seed: int) -> list[IntArray]:
    """Sorted sample indices of each device, from `labels` int64 `(n,)`; sizes differ by one at most.

    Each device draws its mix of classes q from Dirichlet(alpha C p) for C classes with shares p in `labels`, which for
    balanced classes is Dirichlet(alpha, ..., alpha), and takes samples of classes drawn from q. (Hsu et al. leave C out
    of their alpha.) A class that has run out is left out of every mix; devices take turns, so that none is left with
    what the others did not want. Raises `ConfigError` for too few samples, or an `alpha` that is not above 0.
    """
    _check_sizes(len(labels), n_devices)
    if not alpha > 0:
        raise ConfigError(f"alpha = {alpha!r}; Dirichlet's parameter must be above 0")
    rng = np.random.default_rng(seed)
    _, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    piles = [list(rng.permutation(np.flatnonzero(members == label))) for label in range(len(counts))]
    mixes = rng.dirichlet(alpha * len(counts) * counts / len(labels), size=n_devices)
    parts: list[list[int]] = [[] for _ in range(n_devices)]
    for turn in range(len(labels)):
        device = turn % n_devices
        pile = piles[_draw(mixes[device], counts, rng)]
        parts[device].append(pile.pop())
        counts = np.array([len(pile) for pile in piles])
    return [np.sort(np.array(part, np.int64)) for part in parts]


def _draw(mix: Array, counts: IntArray, rng: np.random.Generator) -> int:
    """A class from `mix` among those that have samples; by their numbers when the mix wants none of them."""
    wanted = mix * (counts > 0)
    total = wanted.sum()
    shares = wanted / total if total > 0 else counts / counts.sum()
    return int(rng.choice(len(shares), p=shares))


def _check_sizes(n_samples: int, n_devices: int) -> None:
    if n_devices < 1 or n_samples < n_devices:
        raise ConfigError(f"{n_samples} samples cannot give each of {n_devices} devices at least one")
