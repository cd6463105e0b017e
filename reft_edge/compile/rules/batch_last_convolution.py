"""Convolutions of one group and their derivatives, on tensors with the batch last: (channels, *positions, n_batch).

With the batch as one more spatial axis, which the kernel does not span, all pictures are one:

- input gradient: a convolution with the kernel turned around and its channel axes exchanged;
- weight gradient: for each place of the kernel the product of the output gradient and the shifted input, over all
  positions. Along the first spatial axis it is the gradient that is shifted, along the others the input, so that three
  by three places take two shifted copies of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast, behind, rows
from reft_edge.compile.rules.geometry import Geometry, places_of, size_of, sizes_of
from reft_edge.compile.rules.matmul import gemm
from reft_edge.compile.rules.shapes import pad_zero
from reft_edge.compile.symbols import Dim, Shape


def convolve(
    graph: GraphBuilder, x: Value, weight: Value, bias: Value | None, geometry: Geometry, shape: Shape
) -> BatchLast:
    """The convolution of `x` (channels, *positions, n_batch); torch has the result in `shape`."""
    return BatchLast(_correlate(graph, x, weight, bias, geometry, behind(shape)))


def _correlate(
    graph: GraphBuilder, x: Value, weight: Value, bias: Value | None, geometry: Geometry, shape: Shape
) -> Value:
    """Conv with the batch as the last spatial axis; the result is (channels, *positions, n_batch) of `shape`."""
    kernel = graph.reshape(weight, (*weight.shape, 1))
    picture = graph.reshape(x, (1, *x.shape))
    made = graph.op(
        "Conv",
        *((picture, kernel) if bias is None else (picture, kernel, bias)),
        shape=(1, *shape),
        strides=(*geometry.stride, 1),
        pads=(*geometry.padding, 0) * 2,
        dilations=(*geometry.dilation, 1),
        kernel_shape=sizes_of(kernel.shape[2:]),
    )
    return graph.reshape(made, shape)


def gradients(
    graph: GraphBuilder, grad: Value, x: Value, weight: Value, geometry: Geometry, mask: Sequence[bool]
) -> tuple[BatchLast | Value | None, ...]:
    """Derivatives by input, weight and bias, those that `mask` asks for."""
    need_input, need_weight, need_bias = mask
    grad_input = BatchLast(_input_gradient(graph, grad, weight, x.shape, geometry)) if need_input else None
    grad_weight = _weight_gradient(graph, x, grad, weight.shape, geometry) if need_weight else None
    grad_bias = graph.reduce("ReduceSum", rows(graph, grad), [1], keepdims=False) if need_bias else None
    return grad_input, grad_weight, grad_bias


def _input_gradient(graph: GraphBuilder, grad: Value, weight: Value, shape: Shape, geometry: Geometry) -> Value:
    """The gradient, with zeros between its entries where the stride left inputs out, against the turned kernel."""
    kernel = sizes_of(weight.shape[2:])
    turned = _turned(graph, weight)
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    inner = [span - p for span, p in zip(spans, geometry.padding, strict=True)]
    ones = (1,) * len(kernel)
    if set(geometry.stride) == {1} and min(inner) >= 0:
        return _correlate(graph, grad, turned, None, Geometry(ones, tuple(inner), geometry.dilation, 1), shape)
    spread = _spread(graph, grad, geometry.stride)
    before: list[Dim] = [0, *inner, 0]
    after: list[Dim] = [0] * len(before)
    for axis, (size, low, span) in enumerate(zip(sizes_of(shape[1:-1]), inner, spans, strict=True), 1):
        after[axis] = size + span - low - size_of(spread.shape[axis])
    padded = pad_zero(graph, spread, before, after)
    return _correlate(graph, padded, turned, None, Geometry(ones, (0,) * len(kernel), geometry.dilation, 1), shape)


def _spread(graph: GraphBuilder, grad: Value, stride: Sequence[int]) -> Value:
    """Zeros behind each entry along the spatial axes, so that entries are `stride` apart."""
    for axis, step in enumerate(stride, 1):
        if step > 1:
            split = (*grad.shape[: axis + 1], 1, *grad.shape[axis + 1 :])
            after: list[Dim] = [0] * len(split)
            after[axis + 1] = step - 1
            padded = pad_zero(graph, graph.reshape(grad, split), [0] * len(split), after)
            wide = size_of(grad.shape[axis]) * step
            grad = graph.reshape(padded, (*grad.shape[:axis], wide, *grad.shape[axis + 1 :]))
    return grad


def _turned(graph: GraphBuilder, weight: Value) -> Value:
    """A kernel (out, in, *k) reversed along its spatial axes, as (in, out, *k)."""
    n_out, n_in, *kernel = sizes_of(weight.shape)
    swapped = graph.transpose(weight, [1, 0, *range(2, weight.rank)])
    n_places = int(np.prod(kernel))
    if n_places == 1:
        return swapped
    # A product with a permutation is exact, and much quicker than onnxruntime's Slice with negative steps.
    reversal = graph.constant(np.ascontiguousarray(np.eye(n_places, dtype=np.float32)[::-1]))
    flat = graph.reshape(swapped, (n_in * n_out, n_places))
    return graph.reshape(graph.op("MatMul", flat, reversal, shape=flat.shape), swapped.shape)


def _weight_gradient(graph: GraphBuilder, x: Value, grad: Value, shape: Shape, geometry: Geometry) -> Value:
    """Derivative by the kernel, which has `shape` (out, in, *k)."""
    n_out, n_in, *kernel = sizes_of(shape)
    if geometry.stride[0] == 1:
        windows = [_window(graph, x, (0, *place), grad.shape, geometry, first=1) for place in places_of(kernel[1:])]
        grads = [_row_shifted(graph, grad, place, size_of(x.shape[1]), geometry) for place in range(kernel[0])]
    else:
        windows = [_window(graph, x, place, grad.shape, geometry, first=0) for place in places_of(kernel)]
        grads = [grad]
    inputs = rows(graph, _concat(graph, windows, 0))
    n_places = len(windows) * len(grads)
    # The right operand is copied into the kernel's order each time, the left one is read as it lies.
    if size_of(inputs.shape[0]) < n_out:
        products = [gemm(graph, inputs, graph.transpose(rows(graph, one), [1, 0])) for one in grads]
        by_place = graph.reshape(_concat(graph, products, 0), (n_places, n_in, n_out))
        return graph.reshape(graph.transpose(by_place, [2, 1, 0]), shape)
    products = [gemm(graph, rows(graph, one), graph.transpose(inputs, [1, 0])) for one in grads]
    by_filter = graph.reshape(_concat(graph, products, 1), (n_out, n_places, n_in))
    return graph.reshape(graph.transpose(by_filter, [0, 2, 1]), shape)


def _window(
    graph: GraphBuilder, x: Value, place: Sequence[int], outputs: Shape, geometry: Geometry, *, first: int
) -> Value:
    """The inputs that a place of the kernel meets, along the spatial axes from number `first` on."""
    before: list[Dim] = [0] * x.rank
    after: list[Dim] = [0] * x.rank
    strided: list[int] = []
    for number in range(first, len(geometry.stride)):
        axis, step = number + 1, geometry.stride[number]
        before[axis] = low = geometry.padding[number] - place[number] * geometry.dilation[number]
        reach = (size_of(outputs[axis]) - 1) * step + 1
        after[axis] = reach - size_of(x.shape[axis]) - low
        if step > 1:
            strided.append(axis)
    whole = pad_zero(graph, x, before, after)
    if not strided:
        return whole
    steps = [geometry.stride[axis - 1] for axis in strided]
    return graph.slice(whole, strided, [0] * len(strided), tuple(outputs[axis] for axis in strided), steps)


def _row_shifted(graph: GraphBuilder, grad: Value, place: int, n_rows: int, geometry: Geometry) -> Value:
    """The output gradient where the inputs are that it met at a place of the first spatial axis."""
    before: list[Dim] = [0] * grad.rank
    after: list[Dim] = [0] * grad.rank
    before[1] = low = place * geometry.dilation[0] - geometry.padding[0]
    after[1] = n_rows - size_of(grad.shape[1]) - low
    return pad_zero(graph, grad, before, after)


def _concat(graph: GraphBuilder, parts: Sequence[Value], axis: int) -> Value:
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(size_of(part.shape[axis]) for part in parts)
    return graph.op("Concat", *parts, shape=tuple(shape), axis=axis)
