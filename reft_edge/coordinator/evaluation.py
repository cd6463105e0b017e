"""Evaluate a torch module, or weights in an inference graph, on labelled data.

Both ways share one definition of the metrics, computed in numpy from the outputs, so a model scores the same in torch
and in onnxruntime up to rounding. Outputs are reduced batch by batch: memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import nn

from reft_edge.coordinator.compute import on_compute_device
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from reft_edge.bundle.inference import Predictor
    from reft_edge.data.dataset import Dataset
    from reft_edge.types import Array, Tensors


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """How good a model is on `n` samples: cross entropy in nats, accuracy; or mean squared error."""

    loss: float
    n: int
    accuracy: float | None = None
    mse: float | None = None

    @property
    def score(self) -> float:
        """One number, higher is better: accuracy, or minus the mean squared error."""
        return self.accuracy if self.accuracy is not None else -self.loss


def evaluate(module: nn.Module, dataset: Dataset, *, batch_size: int = 256) -> Metrics:
    """Metrics of `module` in evaluation mode; its mode is restored. Raises `DataError` without targets."""
    training = module.training
    module.eval()
    try:
        with on_compute_device(module) as device, torch.inference_mode():
            outputs = (
                module(torch.as_tensor(batch).to(device)).cpu().numpy() for batch in _batches(dataset, batch_size)
            )
            return measure(outputs, _targets(dataset))
    finally:
        module.train(training)


def evaluate_weights(predictor: Predictor, weights: Tensors, dataset: Dataset, *, batch_size: int = 256) -> Metrics:
    """Metrics of `weights` in an inference graph. Raises `DataError` without targets."""
    return measure((predictor.predict(weights, batch) for batch in _batches(dataset, batch_size)), _targets(dataset))


def measure(outputs: Iterable[Array], targets: Array) -> Metrics:
    """Metrics of consecutive batches of `outputs` (n_batch, *output_shape) against `targets` (n, ...).

    Integer targets: `outputs` are logits (n_batch, n_classes). Float targets: mean squared error over all elements.
    """
    if np.issubdtype(targets.dtype, np.integer):
        return _measure_classes(outputs, targets)
    squares, n_elements = 0.0, 0
    for batch, expected in _aligned(outputs, targets):
        if batch.shape != expected.shape:
            raise DataError(f"the model gives outputs {batch.shape[1:]}, but the targets are {expected.shape[1:]}")
        squares += float(np.square(batch.astype(np.float64) - expected).sum())
        n_elements += expected.size
    return Metrics(loss=squares / n_elements, mse=squares / n_elements, n=len(targets))


def _measure_classes(outputs: Iterable[Array], targets: Array) -> Metrics:
    loss, correct = 0.0, 0
    for batch, expected in _aligned(outputs, targets):
        if batch.ndim != 2 or expected.min() < 0 or expected.max() >= batch.shape[1]:
            raise DataError(
                f"the model gives outputs {batch.shape[1:]}, "
                f"but the targets are classes {expected.min()} to {expected.max()}"
            )
        logits = batch.astype(np.float64)
        top = logits.max(axis=1)
        log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        loss += float((log_total - logits[np.arange(len(expected)), expected]).sum())
        correct += int((batch.argmax(axis=1) == expected).sum())
    return Metrics(loss=loss / len(targets), accuracy=correct / len(targets), n=len(targets))


def _aligned(outputs: Iterable[Array], targets: Array) -> Iterator[tuple[Array, Array]]:
    start = 0
    for batch in outputs:
        yield batch, targets[start : start + len(batch)]
        start += len(batch)


def _batches(dataset: Dataset, batch_size: int) -> Iterator[Array]:
    for start in range(0, len(dataset), batch_size):
        yield np.ascontiguousarray(dataset.samples(slice(start, start + batch_size)))


def _targets(dataset: Dataset) -> Array:
    if dataset.targets is None or len(dataset.targets) == 0:
        raise DataError("evaluation needs samples with targets; this data has none")
    return dataset.targets
