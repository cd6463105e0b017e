"""Merge: the index-aware weighted mean of the devices' updates.

A device trains a variant, which holds some entries of the global tensors. Each entry of the global model moves by the
weighted mean of what the devices that hold it learned:

    g[i] += sum_k w_k d_k[i] / sum_k w_k,  over the devices k whose variant holds entry i,

and stays where nobody holds it. With identity maps this is federated averaging (McMahan et al., arXiv 1602.05629,
algorithm 1); with nested variants it is the aggregation of HeteroFL (Diao et al., arXiv 2010.01264, equations 4 to 6).

On request the sum of a parameter's changes is divided by the weights of all devices, as if those that do not hold an
entry had left it where it is. Entries that few devices hold then do not follow the classes of those few.

Pure numpy. Updates are streamed: peak memory is 16 bytes for each entry of the global model (two float64
accumulators), one update with its map, and the result. What an update may weigh, and whether it came in time, is
decided elsewhere. One device that sends what it likes can move this mean anywhere: `coordinator.robust` has rules that
hold against some.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import FederationError

if TYPE_CHECKING:
    from reft_edge.compile.channels import ChannelMap
    from reft_edge.types import Array, Tensors


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What one device learned: trained minus received weights of its variant, and how much it counts.

    `weight` is usually the number of training samples.
    """

    device: str
    channels: ChannelMap
    delta: Tensors
    weight: float


def merge(
    global_tensors: Tensors, updates: Iterable[ClientUpdate], *, over_cohort: Collection[str] = ()
) -> dict[str, Array]:
    """The global tensors after the weighted mean of `updates`; the arguments are left as they are.

    `over_cohort`: names of the tensors whose sums are divided by the weights of all devices. Statistics and counters
    must not be among them: they are measured, and what nobody measured says nothing.

    Sums are float64, so the order of the updates changes the float32 result by a unit in the last place at most.
    Integer tensors (batch counters) move by the rounded mean; boolean ones stay.
    Raises `FederationError` when an update does not fit its map or the model, or is not finite.
    """
    sums = {name: np.zeros(t.shape, np.float64) for name, t in global_tensors.items() if t.dtype != np.bool_}
    weights = {name: np.zeros_like(total) for name, total in sums.items()}
    cohort = 0.0
    for update in updates:
        check_fits(update, global_tensors)
        cohort += update.weight
        for name in sums.keys() & update.delta.keys():
            weighted = update.delta[name].astype(np.float64) * update.weight
            update.channels.add(name, weighted, into=sums[name])
            update.channels.add(name, update.weight, into=weights[name])
    for name in over_cohort:
        weights[name].fill(cohort)
    return {
        name: _moved(tensor, sums.pop(name), weights.pop(name)) if name in sums else tensor.copy()
        for name, tensor in global_tensors.items()
    }


def _moved(tensor: Array, total: Array, weight: Array) -> Array:
    """`tensor` plus total / weight where somebody trained, in the dtype of `tensor`. Overwrites `total`."""
    step = np.divide(total, weight, out=total, where=weight > 0)  # where nobody trained, total is 0
    if np.issubdtype(tensor.dtype, np.integer):
        np.rint(step, out=step)
    moved: Array = (tensor + step).astype(tensor.dtype)
    return moved


def check_fits(update: ClientUpdate, global_tensors: Tensors) -> None:
    """Raise `FederationError` unless `update` fits its map and the model, is finite, and weighs something."""
    who = f"the update of {update.device!r}"
    if not (isfinite(update.weight) and update.weight > 0):
        raise FederationError(f"{who} weighs {update.weight!r}; expected a number above 0")
    shapes, global_shapes = update.channels.variant_shapes, update.channels.global_shapes
    for name, delta in update.delta.items():
        if name not in shapes or name not in global_tensors:
            raise FederationError(f"{who} has {name!r}, which the {'model' if name in shapes else 'variant'} lacks")
        if delta.shape != shapes[name] or global_tensors[name].shape != global_shapes[name]:
            raise FederationError(
                f"{who}: {name!r} is {delta.shape} for a model of {global_tensors[name].shape}, "
                f"but its map takes {shapes[name]} to {global_shapes[name]}"
            )
        if not np.isfinite(delta).all():
            raise FederationError(f"{who}: {name!r} holds values that are not finite; its training has diverged")
