"""Coordinate-wise trimmed mean and median (Yin et al., arXiv 1803.01498).

For each entry i, with x_(1) <= ... <= x_(k) the values that the k devices which hold it sent:

    trimmed mean:  g_i = 1 / (k - 2t)  sum_{j = t+1}^{k-t} x_(j)        median:  the middle one, or the mean of the two.

The paper trims the same share everywhere, because every device sends every entry. Here variants differ, and hostile
devices are counted over the whole round: all f of them may be among the few that hold an entry. So f values are trimmed
from each side wherever that leaves something, and as many as leave the one or two middle values elsewhere:

    t = min(f, floor((k - 1) / 2)).

With f = 0 it is the mean without weights, and with f at its largest the median. The median of two values is their mean,
and of one that value: **an entry that at most 2f devices hold cannot be defended** by comparing its values, and there
only the norm that screening allows bounds what a hostile device does. Give strong devices enough company, or a smaller
ladder of ratios.

With k > 2f the result lies between two honest values whatever the hostile devices send. Devices count alike: a hostile
one would report as many samples as it likes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from reft_edge.types import Array


def trimmed_mean(values: Array, hostile: int) -> Array:
    """The trimmed mean of each column of `values`, float64 (n_devices, n), NaN where a device lacks the entry.

    `hostile`: how many to trim from each side where enough remain. Returns float64 (n,), NaN where no device has one.
    """
    ordered = np.sort(values, axis=0)  # NaN go last
    n_held = np.count_nonzero(~np.isnan(values), axis=0)
    n_trimmed = np.minimum(hostile, np.maximum(n_held - 1, 0) // 2)
    rank = np.arange(len(values))[:, None]
    kept = (rank >= n_trimmed) & (rank < n_held - n_trimmed)
    total = np.where(kept, ordered, 0.0).sum(axis=0)
    n_kept = n_held - 2 * n_trimmed
    means: Array = np.divide(total, n_kept, out=np.full(total.shape, np.nan), where=n_kept > 0)
    return means


def median(values: Array) -> Array:
    """The median of each column; shapes as for `trimmed_mean`."""
    return trimmed_mean(values, hostile=len(values))
