"""Losses and their derivatives by the model's output, written directly in ONNX.

The derivative of softmax cross entropy is so much simpler than the chain rule over its parts that tracing it would cost
operators and digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reft_edge.bundle.manifest import CrossEntropy, Loss, MeanSquaredError, TensorSpec
from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.symbols import n_elements
from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from reft_edge.types import FloatArray


def target_spec(loss: Loss, output: TensorSpec) -> TensorSpec:
    """One sample's target. Raises `ModelError` when the output does not suit the loss."""
    if isinstance(loss, MeanSquaredError):
        return TensorSpec(name="targets", shape=output.shape, dtype="float32")
    if len(output.shape) != 1:
        raise ModelError(f"cross entropy needs outputs (n_batch, n_classes); the model gives {output.shape!r} a sample")
    return TensorSpec(name="targets", shape=(), dtype="int64")


def add_loss(graph: GraphBuilder, loss: Loss, output: Value, targets: Value) -> tuple[Value, Value]:
    """The loss () and its derivative, shaped as the output."""
    if isinstance(loss, CrossEntropy):
        return _cross_entropy(graph, output, targets, loss.label_smoothing)
    return _mean_squared_error(graph, output, targets)


def _cross_entropy(graph: GraphBuilder, logits: Value, targets: Value, smoothing: float) -> tuple[Value, Value]:
    """Loss: -mean(sum(wanted * log p)); derivative: (p - wanted) / n_batch.

    `wanted` is one-hot, with label smoothing (Szegedy et al., arXiv 1512.00567, section 7) mixed with the uniform
    distribution.
    """
    n_batch, n_classes = logits.shape
    log_p = graph.op("LogSoftmax", logits, shape=logits.shape, axis=1)
    rest = smoothing / int(n_classes)  # type: ignore[arg-type]
    levels = graph.constant(_levels(rest, 1 - smoothing + rest))
    depth = graph.ints([int(n_classes)])  # type: ignore[arg-type]
    wanted = graph.op("OneHot", targets, depth, levels, shape=logits.shape, dtype="float32", axis=-1)
    count = graph.number(n_batch, "float32")
    total = graph.reduce("ReduceSum", graph.pointwise("Mul", wanted, log_p), [0, 1], keepdims=False)
    value = graph.pointwise("Neg", graph.pointwise("Div", total, count))
    difference = graph.pointwise("Sub", graph.pointwise("Exp", log_p), wanted)
    return value, graph.pointwise("Div", difference, count)


def _mean_squared_error(graph: GraphBuilder, output: Value, targets: Value) -> tuple[Value, Value]:
    """Loss: mean((y - t)^2); derivative: 2 (y - t) / n, n the number of all elements."""
    difference = graph.pointwise("Sub", output, targets)
    count = graph.number(n_elements(output.shape), "float32")
    axes = range(output.rank)
    total = graph.reduce("ReduceSumSquare", difference, axes, keepdims=False)
    factor = graph.pointwise("Div", graph.scalar(2, "float32"), count)
    return graph.pointwise("Div", total, count), graph.pointwise("Mul", difference, factor)


def _levels(low: float, high: float) -> FloatArray:
    return np.array([low, high], np.float32)
