"""Central training: what the same net reaches when all private data are in one place.

The yardstick of a federation, and what a federation exists to avoid. Same net, same initial weights, same batch size,
learning rate and optimizer; as many epochs over the pooled data as each device makes over its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch.nn import functional

from reft_edge.bundle.manifest import SGD, Adam, CrossEntropy
from reft_edge.coordinator.compute import on_compute_device
from reft_edge.coordinator.evaluation import evaluate
from reft_edge.coordinator.report.record import CentralFigures
from reft_edge.data.dataset import Dataset, batches

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.bundle.manifest import Loss, Optimizer


class CentralOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to train; see `TrainingSettings` of the federation for the same names."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Optimizer
    loss: Loss
    seed: int


def train_centrally(
    module: nn.Module,
    training: Dataset,
    test: Dataset,
    options: CentralOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CentralFigures:
    """Train `module`, in place, on `training` and measure it on `test`.

    `progress(epochs_done, epochs)` is called after each epoch. The same seed and module give the same result.
    """
    began = time.perf_counter()
    optimizer = _optimizer(module, options)
    rng = np.random.default_rng(options.seed)
    module.train()
    with on_compute_device(module) as device, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        for epoch in range(options.epochs):
            for inputs, targets in batches(training, options.batch_size, rng):
                optimizer.zero_grad()
                outputs = module(torch.as_tensor(inputs).to(device))
                _loss(outputs, torch.as_tensor(targets).to(device), options.loss).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if progress is not None:
                progress(epoch + 1, options.epochs)
    seconds = time.perf_counter() - began
    metrics = evaluate(module, test)
    value = metrics.accuracy if metrics.accuracy is not None else metrics.loss
    return CentralFigures(value=value, epochs=options.epochs, samples=len(training), seconds=seconds)


def _optimizer(module: nn.Module, options: CentralOptions) -> torch.optim.Optimizer:
    match options.optimizer:
        case SGD() as sgd:
            return torch.optim.SGD(
                module.parameters(),
                lr=options.learning_rate,
                momentum=sgd.momentum,
                nesterov=sgd.nesterov,
                weight_decay=sgd.weight_decay,
            )
        case Adam() as adam:
            return torch.optim.Adam(
                module.parameters(),
                lr=options.learning_rate,
                betas=(adam.beta1, adam.beta2),
                eps=adam.epsilon,
                weight_decay=adam.weight_decay,
            )


def _loss(outputs: torch.Tensor, targets: torch.Tensor, loss: Loss) -> torch.Tensor:
    if isinstance(loss, CrossEntropy):
        return functional.cross_entropy(outputs, targets, label_smoothing=loss.label_smoothing)
    return functional.mse_loss(outputs, targets)
