"""Re-estimate the running statistics of batch norm on public inputs.

Averaged statistics of different data are not the statistics of the averaged network: after a merge, means and variances
are those of activations that no longer occur. One pass over public inputs measures them anew, as a cumulative average
over batches. Weights do not change, and labels are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from reft_edge.coordinator.compute import on_compute_device
from reft_edge.data.dataset import scale
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from reft_edge.types import Array

MIN_BATCH = 2
"""A variance needs two values; after a 1 x 1 feature map, a batch of one has only one."""


def has_batch_norm(module: nn.Module) -> bool:
    """Whether there is anything to re-estimate."""
    return bool(_layers(module))


def reestimate_batch_norm(module: nn.Module, inputs: Array, *, batch_size: int = 128) -> int:
    """Set the running means and variances of `module` from `inputs` (n, *sample_shape), in place.

    Everything else stays: weights, dropout off, batch counters, training flags. A last batch smaller than the others is
    left out, because every batch counts the same in the average. Returns the number of batch-norm layers; with 0
    nothing was computed. Raises `DataError` when there are fewer than two samples.
    """
    layers = _layers(module)
    if not layers:
        return 0
    if len(inputs) < MIN_BATCH or batch_size < MIN_BATCH:
        raise DataError(
            f"batch-norm statistics need batches of at least {MIN_BATCH} samples; got {len(inputs)} samples"
        )
    size = min(batch_size, len(inputs))
    with on_compute_device(module) as device, _measuring(module, layers), torch.no_grad():
        for start in range(0, len(inputs) - size + 1, size):
            module(torch.as_tensor(scale(inputs[start : start + size])).to(device))
    return len(layers)


def _layers(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


@contextmanager
def _measuring(module: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Only `layers` in training mode, with a cumulative average that starts empty; flags are restored on leaving."""
    modes = [(child, child.training) for child in module.modules()]
    before = [(layer, layer.momentum, _count(layer)) for layer in layers]
    module.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None  # torch's way to ask for a cumulative average
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
        for layer, momentum, count in before:
            layer.momentum = momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(count)


def _count(layer: _BatchNorm) -> int:
    return int(layer.num_batches_tracked.item()) if layer.num_batches_tracked is not None else 0
