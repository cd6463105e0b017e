"""Convolutions and their derivatives, in one and two (or more) dimensions.

ONNX has no derivative of a convolution. Written with forward operators, by the notation y = conv(x, w):

- input gradient: a transposed convolution; with several groups and stride one rather a convolution with the kernel
  turned around and its channel axes exchanged, because onnxruntime's transposed convolution takes the groups one by
  one;
- weight gradient: for each place of the kernel the shifted input, channel by channel, against the output gradient. That
  is itself a convolution, over the batch; with several groups, or more axes than onnxruntime is quick with, it is
  written as a matrix product, whose inner dimension is the batch and all positions, so nothing is summed afterwards.

Training graphs keep tensors with the batch last (see `reft_edge.compile.layout`) around convolutions of one group and
depthwise ones; `batch_last_convolution` has the rules for those.
"""

from __future__ import annotations

from collections.abc import Sequence

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast, batch_first, batch_last
from reft_edge.compile.lowering import Lowering, NodePair, Tensor, rule
from reft_edge.compile.rules import batch_last_convolution
from reft_edge.compile.rules.geometry import Geometry, places_of, size_of, sizes_of
from reft_edge.compile.rules.matmul import gemm
from reft_edge.compile.rules.shapes import flip, pad_zero
from reft_edge.compile.symbols import Affine, Dim, Shape, n_elements


@rule("aten::convolution", any_layout=True)
def _convolution(
    low: Lowering,
    pair: NodePair,
    x: Tensor,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.of(x.rank, stride, padding, dilation, groups)
    shape = pair.shape
    if _moves_batch(low, x, weight, transposed, geometry):
        return batch_last_convolution.convolve(low.graph, batch_last(low.graph, x), weight, bias, geometry, shape)
    x = _batch_first(low.graph, x)
    if transposed:
        return _transposed_convolution(low.graph, x, weight, bias, geometry, tuple(output_padding), shape)
    return convolve(low.graph, x, weight, bias, geometry, shape)


def _moves_batch(low: Lowering, x: Tensor, weight: Value, transposed: bool, geometry: Geometry) -> bool:
    """Whether a convolution of `x` is computed with the batch last."""
    grouped = geometry.groups > 1 and not batch_last_convolution.is_depthwise(weight, geometry.groups)
    return low.moves_batch and not (transposed or grouped or x.rank > 4) and isinstance(x.shape[0], Affine)


def _batch_first(graph: GraphBuilder, x: Tensor) -> Value:
    return batch_first(graph, x) if isinstance(x, BatchLast) else x


def convolve(
    graph: GraphBuilder, x: Value, weight: Value, bias: Value | None, geometry: Geometry, shape: Shape
) -> Value:
    """Conv with symmetric padding."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return graph.op(
        "Conv",
        *operands,
        shape=shape,
        strides=geometry.stride,
        pads=geometry.padding * 2,
        dilations=geometry.dilation,
        group=geometry.groups,
        kernel_shape=sizes_of(weight.shape[2:]),
    )


def _transposed_convolution(
    graph: GraphBuilder,
    x: Value,
    weight: Value,
    bias: Value | None,
    geometry: Geometry,
    output_padding: tuple[int, ...],
    shape: Shape,
) -> Value:
    operands = (x, weight) if bias is None else (x, weight, bias)
    return graph.op(
        "ConvTranspose",
        *operands,
        shape=shape,
        strides=geometry.stride,
        pads=geometry.padding * 2,
        dilations=geometry.dilation,
        group=geometry.groups,
        output_padding=output_padding,
        kernel_shape=sizes_of(weight.shape[2:]),
    )


@rule("aten::convolution_backward", any_layout=True)
def _convolution_backward(
    low: Lowering,
    pair: NodePair,
    grad: Tensor,
    x: Tensor,
    weight: Value,
    bias_sizes: object,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    del pair, bias_sizes, output_padding
    graph = low.graph
    geometry = Geometry.of(x.rank, stride, padding, dilation, groups)
    if _moves_batch(low, x, weight, transposed, geometry):
        operands = (batch_last(graph, grad), batch_last(graph, x))
        return batch_last_convolution.gradients(graph, *operands, weight, geometry, mask)
    grad, x = _batch_first(graph, grad), _batch_first(graph, x)
    need_input, need_weight, need_bias = mask
    grad_input: Value | None = None
    grad_weight: Value | None = None
    if transposed:
        if need_input:
            grad_input = convolve(graph, grad, weight, None, geometry, x.shape)
        if need_weight:  # the forward pass of one is the input gradient of the other: exchange their roles
            grad_weight = weight_gradient(graph, grad, x, weight.shape, geometry)
    else:
        if need_input:
            grad_input = input_gradient(graph, grad, weight, x.shape, geometry)
        if need_weight:
            grad_weight = weight_gradient(graph, x, grad, weight.shape, geometry)
    grad_bias = graph.channel_sum(grad) if need_bias else None
    return grad_input, grad_weight, grad_bias


def input_gradient(graph: GraphBuilder, grad: Value, weight: Value, shape: Shape, geometry: Geometry) -> Value:
    """Derivative of a convolution by its input, which has `shape`."""
    kernel = sizes_of(weight.shape[2:])
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    turned_padding = tuple(span - pad for span, pad in zip(spans, geometry.padding, strict=True))
    if geometry.groups > 1 and set(geometry.stride) == {1} and min(turned_padding) >= 0:
        turned = _turn_around(graph, weight, geometry.groups)
        return convolve(
            graph,
            grad,
            turned,
            None,
            Geometry(geometry.stride, turned_padding, geometry.dilation, geometry.groups),
            shape,
        )
    rest = tuple(
        size - ((size_of(out) - 1) * s - 2 * p + span + 1)
        for size, out, s, p, span in zip(
            sizes_of(shape[2:]), grad.shape[2:], geometry.stride, geometry.padding, spans, strict=True
        )
    )
    return _transposed_convolution(graph, grad, weight, None, geometry, rest, shape)


def _turn_around(graph: GraphBuilder, weight: Value, groups: int) -> Value:
    """Kernel (out, in/groups, *k) reversed along its spatial axes, as (in, out/groups, *k)."""
    n_out, n_in, *kernel = sizes_of(weight.shape)
    spatial = list(range(weight.rank))[2:]
    if n_in == 1 and groups == n_out:
        return flip(graph, weight, spatial)
    split = graph.reshape(weight, (groups, n_out // groups, n_in, *kernel))
    swapped = graph.transpose(split, [0, 2, 1, *(axis + 1 for axis in spatial)])
    return flip(graph, graph.reshape(swapped, (groups * n_in, n_out // groups, *kernel)), spatial)


def weight_gradient(graph: GraphBuilder, x: Value, grad: Value, shape: Shape, geometry: Geometry) -> Value:
    """Derivative of a convolution of `x` by its kernel, which has `shape` (out, in/groups, *k)."""
    n_out, n_in, *kernel = sizes_of(shape)
    groups = geometry.groups
    if n_in == 1 and groups == n_out:
        return _depthwise_weight_gradient(graph, x, grad, shape, geometry)
    if groups == 1 and max(kernel) > 1 and x.rank <= 4:  # onnxruntime is slow with more than three spatial axes
        return _dense_weight_gradient(graph, x, grad, shape, geometry)
    places = places_of(kernel)
    positions = n_elements((grad.shape[0], *grad.shape[2:]))
    grad_rows = graph.reshape(_channels_first(graph, grad), (n_out, positions))
    shifted = _shifted_inputs(graph, _channels_first(graph, x), grad.shape[2:], places, geometry)
    joined = _join(graph, shifted)
    if groups == 1:
        matrix = graph.reshape(joined, (len(places) * n_in, positions))
        result = gemm(graph, grad_rows, graph.transpose(matrix, [1, 0]))
    else:
        split = graph.reshape(joined, (len(places), groups, n_in, positions))
        by_group = graph.reshape(graph.transpose(split, [1, 0, 2, 3]), (groups, len(places) * n_in, positions))
        rows = graph.reshape(grad_rows, (groups, n_out // groups, positions))
        inner = graph.transpose(by_group, [0, 2, 1])
        result = graph.op("MatMul", rows, inner, shape=(groups, n_out // groups, len(places) * n_in))
    result = graph.reshape(result, (n_out, len(places), n_in))
    return graph.reshape(graph.transpose(result, [0, 2, 1]), shape)


def _dense_weight_gradient(graph: GraphBuilder, x: Value, grad: Value, shape: Shape, geometry: Geometry) -> Value:
    """One convolution with the batch as channels and the channels as one more, last, spatial axis.

    The output gradient is its kernel, stride and dilation change places, and a kernel's place is an output position. So
    onnxruntime gathers the shifted inputs in its cache, in runs as long as there are channels, and no copy of them is
    ever written out: half the time of a matrix product with copies.
    """
    n_out, n_in, *kernel = sizes_of(shape)
    spatial = list(range(2, x.rank))
    outputs = sizes_of(grad.shape[2:])
    behind: list[int] = []
    places: list[int] = []
    for size, out, k, s, p, d in zip(
        sizes_of(x.shape[2:]), outputs, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
    ):
        span = (out - 1) * s + 1
        behind.append(max((k - 1) * d + span - size - p, 0))
        places.append((size + p + behind[-1] - span) // d + 1)
    # More places than the kernel has come out where a stride leaves entries behind the last window.
    correlated = graph.op(
        "Conv",
        graph.reshape(graph.transpose(x, [0, *spatial, 1]), (1, x.shape[0], *x.shape[2:], n_in)),
        graph.reshape(_channels_first(graph, grad), (n_out, x.shape[0], *outputs, 1)),
        shape=(1, n_out, *places, n_in),
        strides=(*geometry.dilation, 1),
        pads=(*geometry.padding, 0, *behind, 0),
        dilations=(*geometry.stride, 1),
        kernel_shape=(*outputs, 1),
    )
    cropped = graph.slice(correlated, spatial, [0] * len(spatial), tuple(kernel), [1] * len(spatial))
    rows = graph.reshape(cropped, (n_out, *kernel, n_in))
    return graph.transpose(rows, [0, len(spatial) + 1, *(axis - 1 for axis in spatial)])


def _join(graph: GraphBuilder, parts: Sequence[Value]) -> Value:
    """One behind the other along the first axis."""
    if len(parts) == 1:
        return parts[0]
    n_rows = sum(size_of(part.shape[0]) for part in parts)
    return graph.op("Concat", *parts, shape=(n_rows, *parts[0].shape[1:]), axis=0)


def _depthwise_weight_gradient(graph: GraphBuilder, x: Value, grad: Value, shape: Shape, geometry: Geometry) -> Value:
    """One channel at a time there is no matrix product: multiply and sum for each place of the kernel."""
    shifted = _shifted_inputs(graph, x, grad.shape[2:], places_of(sizes_of(shape[2:])), geometry)
    sums = [graph.channel_sum(graph.pointwise("Mul", part, grad)) for part in shifted]
    columns = [graph.reshape(total, (shape[0], 1)) for total in sums]
    joined = columns[0] if len(columns) == 1 else graph.op("Concat", *columns, shape=(shape[0], len(columns)), axis=1)
    return graph.reshape(joined, shape)


def _shifted_inputs(
    graph: GraphBuilder, x: Value, positions: Shape, places: Sequence[tuple[int, ...]], geometry: Geometry
) -> list[Value]:
    """For each place of the kernel, the input entries that it meets: (n_batch, channels, *positions)."""
    before: list[Dim] = [0, 0, *geometry.padding]
    padded = pad_zero(graph, x, before, before)
    axes = list(range(2, x.rank))
    return [
        graph.slice(
            padded, axes, [p * d for p, d in zip(place, geometry.dilation, strict=True)], positions, geometry.stride
        )
        for place in places
    ]


def _channels_first(graph: GraphBuilder, x: Value) -> Value:
    return graph.transpose(x, [1, 0, *range(2, x.rank)])
