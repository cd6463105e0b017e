"""Divide a labelled data set among emulated devices, evenly or as unevenly as real ones.

`dirichlet` gives each device its own mix of classes, as in Hsu, Qi and Brown (arXiv 1909.06335): the smaller `alpha`,
the fewer classes a device sees. `iid` gives everybody the same mix. Both are exact covers: every sample goes to
exactly one device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import ConfigError

if TYPE_CHECKING:
    from reft_edge.types import IntArray


def iid(n_samples: int, n_devices: int, *, seed: int) -> list[IntArray]:
    """Sorted sample indices of each device; sizes differ by one at most."""
    _check_sizes(n_samples, n_devices, 1)
    order = np.random.default_rng(seed).permutation(n_samples)
    return [np.sort(part) for part in np.array_split(order, n_devices)]


def dirichlet(labels: IntArray, n_devices: int, *, alpha: float, seed: int, min_samples: int = 1) -> list[IntArray]:
    """Sorted sample indices of each device, from `labels` int64 `(n,)`.

    For each class, the shares of the devices are drawn from Dirichlet(alpha, ..., alpha). A device that would get fewer
    than `min_samples` takes random samples from the device that has most, so one draw always suffices.
    Raises `ConfigError` when there are too few samples or `alpha` is not above 0.
    """
    _check_sizes(len(labels), n_devices, min_samples)
    if not alpha > 0:
        raise ConfigError(f"alpha = {alpha!r}; Dirichlet's parameter must be above 0")
    rng = np.random.default_rng(seed)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(n_devices, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for device, part in enumerate(np.split(members, cuts)):
            owner[part] = device
    _top_up(owner, n_devices, min_samples, rng)
    return [np.flatnonzero(owner == device) for device in range(n_devices)]


def _top_up(owner: IntArray, n_devices: int, min_samples: int, rng: np.random.Generator) -> None:
    """Move samples from the richest device, in place, until everybody owns `min_samples`."""
    counts = np.bincount(owner, minlength=n_devices)
    while counts.min() < min_samples:
        poorest, richest = int(counts.argmin()), int(counts.argmax())
        n_moved = int(min(min_samples - counts[poorest], counts[richest] - min_samples))
        owner[rng.choice(np.flatnonzero(owner == richest), n_moved, replace=False)] = poorest
        counts = np.bincount(owner, minlength=n_devices)


def _check_sizes(n_samples: int, n_devices: int, min_samples: int) -> None:
    if n_devices < 1 or min_samples < 1 or n_samples < n_devices * min_samples:
        raise ConfigError(f"{n_samples} samples cannot give each of {n_devices} devices at least {min_samples}")
