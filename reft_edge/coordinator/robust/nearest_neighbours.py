"""Nearest-neighbour mixing: MoNNA (Farhadkhani et al., arXiv 2209.10931) as a server can use it.

In MoNNA every node averages the n - f vectors nearest to *its own*, which it knows to be honest. A
coordinator has no vector of its own, so it takes the place of every device in turn, which is nearest-neighbour mixing
(Allouah et al., arXiv 2302.01772):

    y_a = 1 / (n - f)  sum of x_b over the n - f devices b nearest to a, a among them,

and the mixed y_a are then joined by a robust rule, here the coordinate-wise trimmed mean. Mixing lets honest devices
with different data agree before anything is trimmed, so that trimming costs less of what a device alone has learned.

Variants that differ: two devices are as far apart as the mean square of their difference over the entries that *both*
hold. y_a has values where a holds the entry, each the mean over those neighbours of a that hold it as well; a device is
its own nearest neighbour, so none of its values is missing. Where few devices hold an entry, trimming does as
`coordinate_wise` says.

Devices that share no parameter are no neighbours. With f = 0 the result is the mean for every parameter, and for
statistics as well unless some variants share nothing. Devices count alike, as for the other rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reft_edge.coordinator.robust.coordinate_wise import trimmed_mean

if TYPE_CHECKING:
    from reft_edge.types import Array


def nearest(distances: Array, hostile: int) -> Array:
    """Who mixes with whom: bool (n, n), with `n - hostile` in each row, fewer where not so many share anything with it.

    `distances`: float (n, n), in any monotonous measure, infinite between devices that share nothing: they are no
    neighbours, and among several of them the order of the updates would decide.
    """
    n_devices = len(distances)
    own_first = distances - np.diag(np.full(n_devices, np.inf))  # also among copies of itself
    order = np.argsort(own_first, axis=1, kind="stable")
    neighbours = np.zeros((n_devices, n_devices), np.bool_)
    np.put_along_axis(neighbours, order[:, : n_devices - hostile], values=True, axis=1)
    return neighbours & np.isfinite(distances)


def mix(values: Array, neighbours: Array) -> Array:
    """Each device's mean over its neighbours: float64 (n_devices, n) to the same, NaN where a device lacks an entry."""
    held = ~np.isnan(values)
    chosen = neighbours.astype(np.float64)
    totals = chosen @ np.where(held, values, 0.0)
    counts = chosen @ held.astype(np.float64)
    mixed: Array = np.divide(totals, counts, out=np.full(values.shape, np.nan), where=held)
    return mixed


def mixed_trimmed_mean(values: Array, neighbours: Array, hostile: int) -> Array:
    """Mix, then trim: float64 (n_devices, n) to (n,), NaN where nobody holds the entry."""
    return trimmed_mean(mix(values, neighbours), hostile)
