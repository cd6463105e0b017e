"""Batch, layer and group norm, and their derivatives.

All three are y = (x - mean) * rstd * weight + bias. With dy the output gradient, g = dy * weight and M the number of entries that share
a mean (Ioffe and Szegedy, arXiv 1502.03167, section 3): dx = rstd * (g - mean(g) - xhat * mean(g * xhat)).
The rules keep x and the statistics for the backward pass and no other activation, and fold scale and shift into as few passes
over x as they can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.lowering import Lowering, NodePair, rule
from reft_edge.compile.symbols import Affine, n_elements


def _per_channel(graph: GraphBuilder, vector: Value, rank: int) -> Value:
    """A vector (channels,) so that it broadcasts over (n_batch, channels, *positions)."""
    return graph.reshape(vector, (vector.shape[0], *((1,) * (rank - 2))))


def _inverse_root(graph: GraphBuilder, variance: Value, epsilon: float) -> Value:
    shifted = graph.pointwise("Add", variance, graph.scalar(epsilon, variance.dtype))
    return graph.pointwise("Reciprocal", graph.pointwise("Sqrt", shifted))


def _scale_and_shift(
    graph: GraphBuilder, x: Value, mean: Value, rstd: Value, weight: Value | None, bias: Value | None
) -> Value:
    """(x - mean) * rstd * weight + bias as one multiplication and one addition an entry."""
    scale = rstd if weight is None else graph.pointwise("Mul", rstd, weight)
    shift = graph.pointwise("Mul", mean, scale)
    shift = graph.pointwise("Neg", shift) if bias is None else graph.pointwise("Sub", bias, shift)
    scaled = graph.pointwise("Mul", x, _per_channel(graph, scale, x.rank))
    return graph.pointwise("Add", scaled, _per_channel(graph, shift, x.rank))


@rule("aten::_native_batch_norm_legit_functional")
def _batch_norm_training(
    low: Lowering,
    pair: NodePair,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Value, ...]:
    del training
    graph = low.graph
    mean, variance, result = _batch_statistics(low, x, weight, bias, epsilon)
    count = n_elements((x.shape[0], *x.shape[2:]))
    unbiased = _unbiased(graph, variance, count)
    new_mean = _moving(graph, running_mean, mean, momentum)
    new_var = _moving(graph, running_var, unbiased, momentum)
    del pair
    return (*result, new_mean, new_var)


@rule("aten::_native_batch_norm_legit.no_stats")
def _batch_norm_without_statistics(
    low: Lowering,
    _: NodePair,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Value, ...]:
    del training, momentum
    return _batch_statistics(low, x, weight, bias, epsilon)[2]


def _batch_statistics(
    low: Lowering, x: Value, weight: Value | None, bias: Value | None, epsilon: float
) -> tuple[Value, Value, tuple[Value, Value, Value]]:
    """Mean, biased variance, and (output, mean, rstd) with the batch's own statistics."""
    graph = low.graph
    count = graph.number(n_elements((x.shape[0], *x.shape[2:])), x.dtype)
    mean = graph.pointwise("Div", graph.channel_sum(x), count)
    centred = graph.pointwise("Sub", x, _per_channel(graph, mean, x.rank))
    # Not E[x^2] - E[x]^2, which loses all digits when a channel's mean is far from zero.
    total = graph.channel_sum(centred, squared=True)
    variance = graph.pointwise("Div", total, count)
    rstd = _inverse_root(graph, variance, epsilon)
    scale = rstd if weight is None else graph.pointwise("Mul", rstd, weight)
    output = graph.pointwise("Mul", centred, _per_channel(graph, scale, x.rank))
    if bias is not None:
        output = graph.pointwise("Add", output, _per_channel(graph, bias, x.rank))
    return mean, variance, (output, mean, rstd)


def _unbiased(graph: GraphBuilder, variance: Value, count: int | Affine) -> Value:
    """Variance times n / (n - 1), as torch keeps it in running_var."""
    number = graph.number(count, variance.dtype)
    smaller = graph.pointwise("Sub", number, graph.scalar(1, variance.dtype))
    return graph.pointwise("Mul", variance, graph.pointwise("Div", number, smaller))


def _moving(graph: GraphBuilder, old: Value, new: Value, momentum: float) -> Value:
    """(1 - momentum) * old + momentum * new."""
    kept = graph.pointwise("Mul", old, graph.scalar(1 - momentum, old.dtype))
    return graph.pointwise("Add", kept, graph.pointwise("Mul", new, graph.scalar(momentum, new.dtype)))


@rule("aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::_native_batch_norm_legit")
def _batch_norm_frozen(
    low: Lowering,
    pair: NodePair,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    *rest: float,
) -> tuple[Value, ...]:
    """With the running statistics: in inference, and in training where a batch norm is frozen."""
    del pair
    rstd = _inverse_root(low.graph, running_var, rest[-1])
    return _scale_and_shift(low.graph, x, running_mean, rstd, weight, bias), running_mean, rstd


@rule("aten::native_batch_norm_backward")
def _batch_norm_backward(
    low: Lowering,
    pair: NodePair,
    grad: Value,
    x: Value,
    weight: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    mean: Value | None,
    rstd: Value | None,
    training: bool,
    epsilon: float,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    del pair
    graph = low.graph
    if not training and running_mean is not None and running_var is not None:
        mean, rstd = running_mean, _inverse_root(graph, running_var, epsilon)
    if mean is None or rstd is None:
        return None, None, None  # pragma: no cover - torch always saves them in training
    bias_grad = graph.channel_sum(grad)
    product = graph.channel_sum(graph.pointwise("Mul", grad, x))
    # sum(grad * xhat) = (sum(grad * x) - mean * sum(grad)) * rstd
    centred = graph.pointwise("Sub", product, graph.pointwise("Mul", mean, bias_grad))
    weight_grad = graph.pointwise("Mul", centred, rstd)
    scale = rstd if weight is None else graph.pointwise("Mul", rstd, weight)
    input_grad: Value | None = None
    if mask[0]:
        scaled = graph.pointwise("Mul", grad, _per_channel(graph, scale, x.rank))
        input_grad = scaled
        if training:
            # dx = scale * grad - x * slope + (mean * slope - scale * sum(grad) / M), slope = scale * rstd * sum(grad * xhat) / M
            count = graph.number(n_elements((x.shape[0], *x.shape[2:])), x.dtype)
            share = graph.pointwise("Div", scale, count)
            slope = graph.pointwise("Mul", share, graph.pointwise("Mul", rstd, weight_grad))
            shift = graph.pointwise(
                "Sub", graph.pointwise("Mul", mean, slope), graph.pointwise("Mul", share, bias_grad)
            )
            line = graph.pointwise("Mul", x, _per_channel(graph, slope, x.rank))
            line = graph.pointwise("Sub", line, _per_channel(graph, shift, x.rank))
            input_grad = graph.pointwise("Sub", scaled, line)
    return input_grad, weight_grad, bias_grad


@rule("aten::native_layer_norm")
def _layer_norm(
    low: Lowering,
    pair: NodePair,
    x: Value,
    sizes: Sequence[int],
    weight: Value | None,
    bias: Value | None,
    epsilon: float,
) -> tuple[Value, ...]:
    scale = weight if weight is not None else low.graph.constant(np.ones(tuple(sizes), np.float32))
    operands = (x, scale) if bias is None else (x, scale, bias)
    outputs = [pair.output(index) for index in range(3)]
    return low.graph.node("LayerNormalization", operands, outputs, axis=-len(sizes), epsilon=float(epsilon))


@rule("aten::native_layer_norm_backward")
def _layer_norm_backward(
    low: Lowering,
    pair: NodePair,
    grad: Value,
    x: Value,
    sizes: Sequence[int],
    mean: Value,
    rstd: Value,
    weight: Value | None,
    bias: Value | None,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    del pair, bias, mask
    graph = low.graph
    inner = list(range(x.rank - len(sizes), x.rank))
    outer = list(range(x.rank - len(sizes)))
    normalized = graph.pointwise("Mul", graph.pointwise("Sub", x, mean), rstd)
    weighted = grad if weight is None else graph.pointwise("Mul", grad, weight)
    input_grad = _normalized_gradient(graph, weighted, normalized, rstd, inner)
    weight_grad = graph.reduce("ReduceSum", graph.pointwise("Mul", grad, normalized), outer, keepdims=False)
    return input_grad, weight_grad, graph.reduce("ReduceSum", grad, outer, keepdims=False)


def _normalized_gradient(
    graph: GraphBuilder, weighted: Value, normalized: Value, rstd: Value, axes: Sequence[int]
) -> Value:
    """rstd * (g - mean(g) - xhat * mean(g * xhat)), the means over `axes`."""
    mean = graph.reduce("ReduceMean", weighted, axes, keepdims=True)
    along = graph.reduce("ReduceMean", graph.pointwise("Mul", weighted, normalized), axes, keepdims=True)
    rest = graph.pointwise("Sub", graph.pointwise("Sub", weighted, mean), graph.pointwise("Mul", normalized, along))
    return graph.pointwise("Mul", rest, rstd)


@rule("aten::native_group_norm")
def _group_norm(
    low: Lowering,
    pair: NodePair,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    n_batch: int | Affine,
    n_channels: int,
    n_positions: int,
    groups: int,
    epsilon: float,
) -> tuple[Value, ...]:
    graph = low.graph
    width = n_channels // groups * n_positions
    rows = graph.reshape(x, (n_batch, groups, width))
    mean = graph.reduce("ReduceMean", rows, [2], keepdims=True)
    centred = graph.pointwise("Sub", rows, mean)
    total = graph.reduce("ReduceSumSquare", centred, [2], keepdims=True)
    variance = graph.pointwise("Div", total, graph.scalar(width, x.dtype))
    rstd = _inverse_root(graph, variance, epsilon)
    result = graph.reshape(graph.pointwise("Mul", centred, rstd), x.shape)
    if weight is not None:
        result = graph.pointwise("Mul", result, _per_channel(graph, weight, x.rank))
    if bias is not None:
        result = graph.pointwise("Add", result, _per_channel(graph, bias, x.rank))
    flat = (pair.output(1)[0], pair.output(2)[0])
    return result, graph.reshape(mean, flat[0]), graph.reshape(rstd, flat[1])


@rule("aten::native_group_norm_backward")
def _group_norm_backward(
    low: Lowering,
    pair: NodePair,
    grad: Value,
    x: Value,
    mean: Value,
    rstd: Value,
    weight: Value | None,
    n_batch: int | Affine,
    n_channels: int,
    n_positions: int,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    del pair, mask
    graph = low.graph
    rows = (n_batch, groups, n_channels // groups * n_positions)
    column = (n_batch, groups, 1)
    mean, rstd = graph.reshape(mean, column), graph.reshape(rstd, column)
    normalized = graph.pointwise("Mul", graph.pointwise("Sub", graph.reshape(x, rows), mean), rstd)
    weighted = grad if weight is None else graph.pointwise("Mul", grad, _per_channel(graph, weight, x.rank))
    input_grad = _normalized_gradient(graph, graph.reshape(weighted, rows), normalized, rstd, [2])
    weight_grad = graph.channel_sum(graph.pointwise("Mul", grad, graph.reshape(normalized, x.shape)))
    return graph.reshape(input_grad, x.shape), weight_grad, graph.channel_sum(grad)
