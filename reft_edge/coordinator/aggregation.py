"""Merge: the index-aware weighted mean of the devices' updates.

A device trains a variant, which holds some entries of the global tensors. Each entry of the global model moves by the
weighted mean of what the devices that hold it learned:

    g[i] += sum_k w_k d_k[i] / sum_k w_k,  over the devices k whose variant holds entry i,

and stays where nobody holds it. With identity maps this is federated averaging (McMahan et al., arXiv 1602.05629,
algorithm 1); with nested variants it is the aggregation of HeteroFL (Diao et al., arXiv 2010.01264, equations 4 to 6).

Pure numpy. Updates are streamed: peak memory is 16 bytes for each entry of the global model (two float64
accumulators), one update with its map, and the result. What an update may weigh, and whether it came in time, is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def merge(global_tensors: Tensors, updates: Iterable[ClientUpdate]) -> dict[str, Array]:
    """The global tensors after the weighted mean of `updates`; the arguments are left as they are.

    Sums are float64, so the order of the updates changes the float32 result by a unit in the last place at most.
    Integer tensors (batch counters) move by the rounded mean; boolean ones stay.
    Raises `FederationError` when an update does not fit its map or the model, or is not finite.
    """
    sums = {name: np.zeros(tensor.size, np.float64) for name, tensor in global_tensors.items() if _moves(tensor)}
    weights = {name: np.zeros(total.size, np.float64) for name, total in sums.items()}
    for update in updates:
        _check_weight(update)
        for name, delta in update.delta.items():
            indices = _checked_indices(update, name, delta, global_tensors)
            if name in sums:
                sums[name][indices] += update.weight * delta.reshape(-1).astype(np.float64)
                weights[name][indices] += update.weight
    return {
        name: _moved(tensor, sums.pop(name), weights.pop(name)) if name in sums else tensor.copy()
        for name, tensor in global_tensors.items()
    }


def _moves(tensor: Array) -> bool:
    return tensor.dtype != np.bool_


def _moved(tensor: Array, total: Array, weight: Array) -> Array:
    """`tensor` plus total / weight where somebody trained, in the dtype and shape of `tensor`."""
    step = np.divide(total, weight, out=total, where=weight > 0)  # where nobody trained, total is 0
    if np.issubdtype(tensor.dtype, np.integer):
        step = np.rint(step, out=step)
    moved: Array = (tensor.reshape(-1) + step).astype(tensor.dtype).reshape(tensor.shape)
    return moved


def _check_weight(update: ClientUpdate) -> None:
    if not (isfinite(update.weight) and update.weight > 0):
        raise FederationError(f"the update of {update.device!r} weighs {update.weight!r}; expected a number above 0")


def _checked_indices(update: ClientUpdate, name: str, delta: Array, global_tensors: Tensors) -> Array:
    """Flat indices into the global tensor `name`, int64 `(delta.size,)`, each at most once and in range."""
    where = f"the update of {update.device!r}, tensor {name!r}"
    indices = update.channels.indices.get(name)
    if indices is None or name not in global_tensors:
        raise FederationError(f"{where}: not a tensor of the {'variant' if indices is None else 'global model'}")
    if delta.shape != indices.shape:
        raise FederationError(f"{where}: shape {delta.shape}, but the variant's is {indices.shape}")
    if not np.isfinite(delta).all():
        raise FederationError(f"{where}: holds values that are not finite; the device's training has diverged")
    flat = np.asarray(indices).reshape(-1)
    n_entries = global_tensors[name].size
    if flat.size and (flat.min() < 0 or flat.max() >= n_entries):
        raise FederationError(f"{where}: its map points outside the {n_entries} entries of the global tensor")
    held = np.zeros(n_entries, np.bool_)
    held[flat] = True
    if np.count_nonzero(held) != flat.size:  # a repeated index would silently lose all but one contribution
        raise FederationError(f"{where}: its map names an entry of the global tensor twice")
    return flat
