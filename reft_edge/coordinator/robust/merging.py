"""Merge by a robust rule: the same step for every device's part of the model, whoever lies.

    g[i] += rule(d_k[i], over the devices k whose variant holds entry i),

rule by rule as the modules beside this one say. Entries that nobody holds stay. What all rules share:

- Every device counts alike. How many samples it has is what it says itself, and the papers' guarantees are for equal
  votes. Only the mean (`coordinator.aggregation`) weighs by samples.
- Integer tensors (batch counters) move by the rounded result; boolean ones stay.
- `monna` and `flag` compare devices by their trainable parameters. What else there is (batch-norm statistics, counters)
  is no direction of learning: `monna` joins it among the same neighbours, `flag` takes its coordinate-wise median, so
  that a variance stays between those that devices measured.

Memory: one update and two tensors of global size, about 100 MiB of slabs, and the result (`stack`). Time grows with
devices squared for `monna` and `flag`; 100 devices are no matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from reft_edge.coordinator.aggregation import ClientUpdate
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.robust import flag
from reft_edge.coordinator.robust.coordinate_wise import median, trimmed_mean
from reft_edge.coordinator.robust.geometry import measure
from reft_edge.coordinator.robust.nearest_neighbours import mixed_trimmed_mean, nearest
from reft_edge.coordinator.robust.stack import UpdateStack
from reft_edge.errors import FederationError

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors

Rule: TypeAlias = Callable[[str, "Array"], "Array"]
"""(tensor's name, values of all devices (n_devices, n)) -> the step (n,), NaN where nobody holds the entry."""


def merge_robustly(
    global_tensors: Tensors,
    updates: Iterable[ClientUpdate],
    *,
    settings: AggregationSettings,
    parameters: Collection[str],
    directory: Path | None = None,
) -> dict[str, Array]:
    """The global tensors after the step of `settings.rule`; the arguments are left as they are.

    `parameters`: names of the tensors that training moves by gradients. `directory`: where the updates may lie side by
    side meanwhile. The order of the updates changes the result by rounding only. Weights of updates are not used.
    Raises `FederationError` as `aggregation.merge` does, and `ResourceError` when the disk is full.
    """
    merged = {name: tensor.copy() for name, tensor in global_tensors.items()}
    with UpdateStack(global_tensors, updates, directory=directory) as stack:
        if stack.n_devices == 0:
            return merged
        rule = _rule(settings, stack, parameters)
        for name in stack.names:
            entries = merged[name].reshape(-1)
            for which, values in stack.slabs(name):
                entries[which] = _moved(entries[which], rule(name, values))
            merged[name] = entries.reshape(merged[name].shape)
    return merged


def _rule(settings: AggregationSettings, stack: UpdateStack, parameters: Collection[str]) -> Rule:
    """The rule, after the look at all updates that it needs."""
    n_hostile = settings.n_hostile(stack.n_devices)
    match settings.rule:
        case "trimmed_mean":
            return lambda _, values: trimmed_mean(values, n_hostile)
        case "median":
            return lambda _, values: median(values)
        case "monna":
            neighbours = nearest(measure(stack, parameters).mean_square_distances, n_hostile)
            return lambda _, values: mixed_trimmed_mean(values, neighbours, n_hostile)
        case "flag":
            geometry = measure(stack, parameters)
            multipliers = flag.factors(geometry.products, geometry.n_held, settings.n_dimensions(stack.n_devices))
            return lambda name, values: flag.combine(values, multipliers) if name in parameters else median(values)
    raise FederationError(f"{settings.rule!r} is no robust rule; the mean is merged by `aggregation.merge`")


def _moved(entries: Array, step: Array) -> Array:
    """`entries` plus `step` where there is one, in their dtype."""
    whole = np.where(np.isnan(step), 0.0, step)
    if np.issubdtype(entries.dtype, np.integer):
        np.rint(whole, out=whole)
    moved: Array = (entries + whole).astype(entries.dtype)
    return moved
