"""Inner products and distances between updates of different variants, from slabs.

For devices a and b with the entries S_a and S_b, over the trainable parameters:

    products[a, b]  = sum over S_a and S_b of a_i b_i     (a missing entry counts as 0)
    squares[a, b]   = sum over S_a and S_b of a_i^2
    n_shared[a, b]  = |S_a and S_b|

Batch-norm statistics and counters are left out: they are measurements, and a running variance of a device with dark
pictures would outweigh all that it learned.

Memory: three matrices (n_devices, n_devices) beside a slab.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.coordinator.robust.stack import UpdateStack

if TYPE_CHECKING:
    from reft_edge.types import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """All float64 (n_devices, n_devices); see the module's docstring."""

    products: Array
    squares: Array
    n_shared: Array

    @property
    def n_held(self) -> Array:
        """Parameters that each device holds, (n_devices,)."""
        return np.diagonal(self.n_shared)

    @property
    def mean_square_distances(self) -> Array:
        """Squared distance over the shared entries, for each of them: variants of all sizes compare alike.

        Infinite for devices that share nothing, and 0 from a device to itself.
        """
        totals = np.maximum(self.squares + self.squares.T - 2 * self.products, 0.0)  # rounding may fall below 0
        np.fill_diagonal(totals, 0.0)
        means: Array = np.divide(totals, self.n_shared, out=np.full(totals.shape, np.inf), where=self.n_shared > 0)
        return means


def measure(stack: UpdateStack, parameters: Collection[str]) -> Geometry:
    """Compare all devices over the tensors in `parameters`."""
    shape = (stack.n_devices, stack.n_devices)
    products, squares, n_shared = (np.zeros(shape, np.float64) for _ in range(3))
    for name in stack.names:
        if name not in parameters:
            continue
        for _, values in stack.slabs(name):
            held = ~np.isnan(values)
            filled = np.where(held, values, 0.0)
            counted = held.astype(np.float64)
            products += filled @ filled.T
            squares += np.square(filled) @ counted.T
            n_shared += counted @ counted.T
    return Geometry(products=products, squares=squares, n_shared=n_shared)
