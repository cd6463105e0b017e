"""Batch, layer and group norm, and their derivatives.

All three are y = (x - mean) * rstd * weight + bias. With dy the output gradient, g = dy * weight and means over the
entries that share one (Ioffe and Szegedy, arXiv 1502.03167, section 3):

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))

The rules keep x and the statistics for the backward pass and no other activation, and fold scale and shift into as few
passes over x as they can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast, batch_first, batch_last
from reft_edge.compile.lowering import Lowering, NodePair, Tensor, rule
from reft_edge.compile.symbols import Affine, Dim, Shape, n_elements
from reft_edge.errors import ModelError


def _per_channel(graph: GraphBuilder, vector: Value, rank: int) -> Value:
    """A vector (channels,) so that it broadcasts over (n_batch, channels, *positions)."""
    return graph.reshape(vector, (vector.shape[0], *((1,) * (rank - 2))))


def _inverse_root(graph: GraphBuilder, variance: Value, epsilon: float) -> Value:
    shifted = graph.pointwise("Add", variance, graph.scalar(epsilon, variance.dtype))
    return graph.pointwise("Reciprocal", graph.pointwise("Sqrt", shifted))


def _normalize(
    graph: GraphBuilder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    variance: Value | None,
    epsilon: float,
) -> Value:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias by channel, in one pass over x.

    What is None is left out. onnxruntime folds the vectors to one multiplication and one addition an entry.
    """
    zeros, ones = (graph.constant(np.full(_channels(x), fill, np.float32)) for fill in (0, 1))
    operands = (x, weight or ones, bias or zeros, mean or zeros, variance or ones)
    return graph.op("BatchNormalization", *operands, shape=x.shape, epsilon=float(epsilon))


def _channels(x: Tensor) -> int:
    channels = x.shape[1]
    if isinstance(channels, Affine):
        raise ModelError("a batch norm over the batch axis cannot be compiled")
    return channels


@rule("aten::_native_batch_norm_legit_functional", any_layout=True)
def _batch_norm_training(
    low: Lowering,
    pair: NodePair,
    x: Tensor,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, ...]:
    del training, pair
    graph = low.graph
    statistics = (running_mean, running_var)
    output, mean, variance = _normalized_by_batch(graph, x, weight, bias, epsilon, statistics)
    new_mean = _moving(graph, running_mean, mean, momentum, graph.scalar(momentum, mean.dtype))
    unbiased = _unbiased_share(graph, n_elements((x.shape[0], *x.shape[2:])), momentum)
    new_var = _moving(graph, running_var, variance, momentum, unbiased)
    return output, mean, _inverse_root(graph, variance, epsilon), new_mean, new_var


@rule("aten::_native_batch_norm_legit.no_stats", any_layout=True)
def _batch_norm_without_statistics(
    low: Lowering,
    pair: NodePair,
    x: Tensor,
    weight: Value | None,
    bias: Value | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, ...]:
    del pair, training, momentum
    graph = low.graph
    if isinstance(x, Value) and isinstance(x.shape[1], Affine):  # an instance norm: torch folds the batch into channels
        return _instance_norm(graph, x, weight, bias, epsilon)
    output, mean, variance = _normalized_by_batch(graph, x, weight, bias, epsilon)
    return output, mean, _inverse_root(graph, variance, epsilon)


def _instance_norm(
    graph: GraphBuilder, x: Value, weight: Value | None, bias: Value | None, epsilon: float
) -> tuple[Value, ...]:
    """Output, mean and rstd for x (1, n_batch * channels, *positions)."""
    axes = range(2, x.rank)
    mean = graph.reduce("ReduceMean", x, axes, keepdims=True)
    centred = graph.pointwise("Sub", x, mean)
    variance = graph.reduce("ReduceMean", graph.pointwise("Mul", centred, centred), axes, keepdims=True)
    rstd = _inverse_root(graph, variance, epsilon)
    output = graph.pointwise("Mul", centred, rstd)
    if weight is not None:
        output = graph.pointwise("Mul", output, _per_channel(graph, weight, x.rank))
    if bias is not None:
        output = graph.pointwise("Add", output, _per_channel(graph, bias, x.rank))
    return output, graph.reshape(mean, (x.shape[1],)), graph.reshape(rstd, (x.shape[1],))


def _normalized_by_batch(
    graph: GraphBuilder,
    x: Tensor,
    weight: Value | None,
    bias: Value | None,
    epsilon: float,
    statistics: tuple[Value, Value] | None = None,
) -> tuple[Tensor, Value, Value]:
    """The output, and mean and biased variance of each channel over batch and positions.

    `statistics` are vectors of this batch norm's own.
    """
    if isinstance(x, BatchLast) and statistics is not None:
        picture = _picture(graph, x.stored)
        output, mean, variance = _in_one_node(graph, picture, weight, bias, epsilon, statistics)
        return BatchLast(graph.reshape(output, x.stored.shape)), mean, variance
    x = batch_first(graph, x) if isinstance(x, BatchLast) else x
    mean, variance = _batch_statistics(graph, x)
    return _normalize(graph, x, weight, bias, mean, variance, epsilon), mean, variance


def _in_one_node(
    graph: GraphBuilder,
    picture: Value,
    weight: Value | None,
    bias: Value | None,
    epsilon: float,
    statistics: tuple[Value, Value],
) -> tuple[Value, Value, Value]:
    """onnxruntime's operator for training: three short passes over each row, where several nodes take twice as long.

    It writes its statistics over the old ones, even over a constant or a graph's input; with momentum 0 it reads
    nothing from them. So it is given two vectors of zeros that nobody else reads, and moving averages are ours.
    """
    zeros, ones = (graph.constant(np.full(_channels(picture), fill, np.float32)) for fill in (0, 1))
    overwritten = [graph.pointwise("Sub", vector, vector) for vector in statistics]
    vector = ((_channels(picture),), picture.dtype)
    output, mean, variance = graph.node(
        "BatchNormalization",
        (picture, weight or ones, bias or zeros, *overwritten),
        [(picture.shape, picture.dtype), vector, vector],
        epsilon=float(epsilon),
        momentum=0.0,
        training_mode=1,
    )
    return output, mean, variance


def _picture(graph: GraphBuilder, stored: Value) -> Value:
    """A tensor with the batch last as one picture of one row: (1, channels, positions * n_batch)."""
    return graph.reshape(stored, (1, stored.shape[0], n_elements(stored.shape[1:])))


def _batch_statistics(graph: GraphBuilder, x: Value) -> tuple[Value, Value]:
    """Mean and biased variance of each channel over batch and positions.

    Not by E[x^2] - E[x]^2, which loses all digits when a channel's mean is far from zero.
    """
    mean = graph.channel_mean(x)
    centred = graph.pointwise("Sub", x, _per_channel(graph, mean, x.rank))
    return mean, graph.channel_mean(centred, squared=True)


def _unbiased_share(graph: GraphBuilder, count: Dim, momentum: float) -> Value:
    """momentum * n / (n - 1): torch keeps the unbiased variance in running_var."""
    number = graph.number(count, "float32")
    smaller = graph.pointwise("Sub", number, graph.scalar(1, "float32"))
    return graph.pointwise("Mul", graph.pointwise("Div", number, smaller), graph.scalar(momentum, "float32"))


def _moving(graph: GraphBuilder, old: Value, new: Value, momentum: float, share: Value) -> Value:
    """(1 - momentum) * old + share * new."""
    kept = graph.pointwise("Mul", old, graph.scalar(1 - momentum, old.dtype))
    return graph.pointwise("Add", kept, graph.pointwise("Mul", new, share))


@rule(
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_native_batch_norm_legit",
    any_layout=True,
)
def _batch_norm_frozen(
    low: Lowering,
    pair: NodePair,
    x: Tensor,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    *rest: float,
) -> tuple[Tensor, ...]:
    """With the running statistics: in inference, and in training where a batch norm is frozen."""
    del pair
    picture = _picture(low.graph, x.stored) if isinstance(x, BatchLast) else x
    output: Tensor = _normalize(low.graph, picture, weight, bias, running_mean, running_var, rest[-1])
    if isinstance(x, BatchLast) and isinstance(output, Value):
        output = BatchLast(low.graph.reshape(output, x.stored.shape))
    return output, running_mean, _inverse_root(low.graph, running_var, rest[-1])


@rule("aten::native_batch_norm_backward", any_layout=True)
def _batch_norm_backward(
    low: Lowering,
    pair: NodePair,
    grad: Tensor,
    x: Tensor,
    weight: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    mean: Value | None,
    rstd: Value | None,
    training: bool,
    epsilon: float,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    del pair
    graph = low.graph
    if not training and running_mean is not None and running_var is not None:
        mean, rstd = running_mean, _inverse_root(graph, running_var, epsilon)
    if mean is None or rstd is None:
        return None, None, None  # pragma: no cover - torch always saves them in training
    shape: Shape | None = None
    if isinstance(grad, BatchLast) or isinstance(x, BatchLast):
        grad, x = batch_last(graph, grad), batch_last(graph, x)
        shape = x.shape
        grad, x = _picture(graph, grad), _picture(graph, x)
    bias_grad = graph.channel_sum(grad)
    product = graph.channel_sum(graph.pointwise("Mul", grad, x))
    # sum(grad * xhat) = (sum(grad * x) - mean * sum(grad)) * rstd
    centred = graph.pointwise("Sub", product, graph.pointwise("Mul", mean, bias_grad))
    weight_grad = graph.pointwise("Mul", centred, rstd)
    if not mask[0]:
        return None, weight_grad, bias_grad
    scale = rstd if weight is None else graph.pointwise("Mul", rstd, weight)
    input_grad = graph.pointwise("Mul", grad, _per_channel(graph, scale, x.rank))
    if training:
        line = _line(graph, x, scale, rstd, mean, weight_grad, bias_grad)
        input_grad = graph.pointwise("Add", input_grad, line)
    return (input_grad if shape is None else BatchLast(graph.reshape(input_grad, shape))), weight_grad, bias_grad


def _line(
    graph: GraphBuilder, x: Value, scale: Value, rstd: Value, mean: Value, weight_grad: Value, bias_grad: Value
) -> Value:
    """What the statistics add to the input gradient: level + slope * (x - mean) by channel.

    dx = scale * (grad - mean(grad)) + slope * (x - mean), with slope = -scale * rstd * sum(grad * xhat) / M
    """
    count = graph.number(n_elements((x.shape[0], *x.shape[2:])), x.dtype)
    share = graph.pointwise("Neg", graph.pointwise("Div", scale, count))
    slope = graph.pointwise("Mul", share, graph.pointwise("Mul", rstd, weight_grad))
    level = graph.pointwise("Mul", share, bias_grad)
    if not isinstance(x.shape[1], Affine):
        return _normalize(graph, x, slope, level, mean, None, 0.0)
    line = graph.pointwise("Mul", x, _per_channel(graph, slope, x.rank))
    level = graph.pointwise("Sub", level, graph.pointwise("Mul", mean, slope))
    return graph.pointwise("Add", line, _per_channel(graph, level, x.rank))


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
