"""Convolutions and their derivatives on tensors with the batch last: (channels, *positions, n_batch).

Those of one group, and those with a group for each channel (depthwise). With the batch as one more spatial axis, which
the kernel does not span, all pictures are one:

- input gradient: a convolution with the kernel turned around and its channel axes exchanged; with a stride, one for
  each phase of the stride with the places of the kernel that meet it, so that no zeros are multiplied;
- weight gradient: for each place of the kernel the product of the output gradient and the shifted input, over all
  positions. Along the first spatial axis it is the gradient that is shifted, along the others the input, so that three
  by three places take two shifted copies of each. Depthwise, where there are no matrices, products are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast, behind, rows
from reft_edge.compile.rules.geometry import Geometry, places_of, size_of, sizes_of
from reft_edge.compile.rules.matmul import gemm
from reft_edge.compile.rules.shapes import pad_zero
from reft_edge.compile.symbols import Dim, Shape, n_elements


def convolve(
    graph: GraphBuilder, x: Value, weight: Value, bias: Value | None, geometry: Geometry, shape: Shape
) -> BatchLast:
    """The convolution of `x` (channels, *positions, n_batch); torch has the result in `shape`."""
    pads = (geometry.padding, geometry.padding)
    return BatchLast(_correlate(graph, x, weight, bias, geometry, pads, behind(shape)))


def is_depthwise(weight: Value, groups: int) -> bool:
    """Whether each channel has a group of its own, and as many results as inputs."""
    return weight.shape[1] == 1 and weight.shape[0] == groups


def _correlate(
    graph: GraphBuilder,
    x: Value,
    weight: Value,
    bias: Value | None,
    geometry: Geometry,
    pads: tuple[Sequence[int], Sequence[int]],
    shape: Shape,
) -> Value:
    """Conv with the batch as the last spatial axis; the result is (channels, *positions, n_batch) of `shape`.

    `pads` are before and behind each axis, in place of the geometry's; negative ones cut.
    """
    if min(*pads[0], *pads[1]) < 0:
        cut = [[min(pad, 0) for pad in side] for side in pads]
        x = pad_zero(graph, x, [0, *cut[0], 0], [0, *cut[1], 0])
    kernel = graph.reshape(weight, (*weight.shape, 1))
    picture = graph.reshape(x, (1, *x.shape))
    made = graph.op(
        "Conv",
        *((picture, kernel) if bias is None else (picture, kernel, bias)),
        shape=(1, *shape),
        strides=(*geometry.stride, 1),
        pads=[*(max(pad, 0) for pad in pads[0]), 0, *(max(pad, 0) for pad in pads[1]), 0],
        dilations=(*geometry.dilation, 1),
        group=geometry.groups,
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
    """Derivative by the input, which is stored in `shape`."""
    phased = tuple(s if d == 1 else 1 for s, d in zip(geometry.stride, geometry.dilation, strict=True))
    apart = [s // p for s, p in zip(geometry.stride, phased, strict=True)]
    grad = _spread(graph, grad, apart)  # a stride with dilation: zeros between the entries
    counts = [-(-size // step) for size, step in zip(sizes_of(shape[1:-1]), phased, strict=True)]
    phases = product(*(range(step) for step in phased))
    parts = [_phase(graph, grad, weight, geometry, phased, phase, (shape[0], *counts, shape[-1])) for phase in phases]
    for axis in reversed(range(1, len(phased) + 1)):
        step = phased[axis - 1]
        parts = [_interleave(graph, parts[first : first + step], axis) for first in range(0, len(parts), step)]
    whole = parts[0]
    rest: list[Dim] = [0, *(size_of(a) - size_of(b) for a, b in zip(shape[1:-1], whole.shape[1:-1], strict=True)), 0]
    return pad_zero(graph, whole, [0] * whole.rank, rest)


def _phase(
    graph: GraphBuilder,
    grad: Value,
    weight: Value,
    geometry: Geometry,
    stride: Sequence[int],
    phase: Sequence[int],
    shape: Shape,
) -> Value:
    """The input gradient at the positions `stride * q + phase`, in `shape`.

    Along each axis places k0, k0 + stride, ... of the kernel meet them, and place k0 + stride * j meets the output
    gradient at q + shift - j.
    """
    kernel = sizes_of(weight.shape[2:])
    firsts = [(r + p) % s for r, p, s in zip(phase, geometry.padding, stride, strict=True)]
    counts = [max(-(-(k - first) // s), 0) for k, first, s in zip(kernel, firsts, stride, strict=True)]
    if min(counts) == 0:
        return graph.expand(graph.scalar(0, grad.dtype), shape)
    part = graph.slice(weight, range(2, weight.rank), firsts, tuple(counts), stride)
    shifts = [(r + p - first) // s for r, p, first, s in zip(phase, geometry.padding, firsts, stride, strict=True)]
    spans = [d * (n - 1) for d, n in zip(geometry.dilation, counts, strict=True)]
    before = [span - shift for span, shift in zip(spans, shifts, strict=True)]
    after = [
        size_of(size) + span - size_of(given) - low
        for size, span, given, low in zip(shape[1:-1], spans, grad.shape[1:-1], before, strict=True)
    ]
    same = Geometry((1,) * len(kernel), (0,) * len(kernel), geometry.dilation, geometry.groups)
    return _correlate(graph, grad, _turned(graph, part, geometry.groups), None, same, (before, after), shape)


def _interleave(graph: GraphBuilder, parts: Sequence[Value], axis: int) -> Value:
    """Entries along an axis from each of the parts in turn."""
    if len(parts) == 1:
        return parts[0]
    shape = parts[0].shape
    run = n_elements(shape[axis + 1 :])
    flat = [graph.reshape(part, (*shape[: axis + 1], run)) for part in parts]
    joined = graph.op("Concat", *flat, shape=(*shape[: axis + 1], len(parts) * run), axis=axis + 1)
    return graph.reshape(joined, (*shape[:axis], size_of(shape[axis]) * len(parts), *shape[axis + 1 :]))


def _spread(graph: GraphBuilder, grad: Value, stride: Sequence[int]) -> Value:
    """Zeros behind each entry along the spatial axes, so that entries are `stride` apart."""
    for axis, step in enumerate(stride, 1):
        if step > 1:
            grad = _interleave(
                graph, [grad, *[graph.expand(graph.scalar(0, grad.dtype), grad.shape)] * (step - 1)], axis
            )
    return grad


def _turned(graph: GraphBuilder, weight: Value, groups: int) -> Value:
    """A kernel (out, in, *k) reversed along its spatial axes, as (in, out, *k); a depthwise one stays (out, 1, *k)."""
    if not is_depthwise(weight, groups):
        weight = graph.transpose(weight, [1, 0, *range(2, weight.rank)])
    n_rows, n_columns, *kernel = sizes_of(weight.shape)
    n_places = prod(kernel)
    if n_places == 1:
        return weight
    # A product with a permutation is exact, and much quicker than onnxruntime's Slice with negative steps.
    reversal = graph.constant(np.ascontiguousarray(np.eye(n_places, dtype=np.float32)[::-1]))
    flat = graph.reshape(weight, (n_rows * n_columns, n_places))
    return graph.reshape(graph.op("MatMul", flat, reversal, shape=flat.shape), weight.shape)


def _weight_gradient(graph: GraphBuilder, x: Value, grad: Value, shape: Shape, geometry: Geometry) -> Value:
    """Derivative by the kernel, which has `shape` (out, in, *k)."""
    n_out, n_in, *kernel = sizes_of(shape)
    if geometry.stride[0] == 1:
        windows = [_window(graph, x, (0, *place), grad.shape, geometry, first=1) for place in places_of(kernel[1:])]
        grads = [_row_shifted(graph, grad, place, size_of(x.shape[1]), geometry) for place in range(kernel[0])]
    else:
        windows = [_window(graph, x, place, grad.shape, geometry, first=0) for place in places_of(kernel)]
        grads = [grad]
    if geometry.groups > 1:
        return _summed_products(graph, windows, grads, shape)
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


def _summed_products(graph: GraphBuilder, windows: Sequence[Value], grads: Sequence[Value], shape: Shape) -> Value:
    """The depthwise weight gradient, place by place."""
    sums = [
        graph.reduce("ReduceSum", graph.pointwise("Mul", rows(graph, window), rows(graph, grad)), [1], keepdims=True)
        for grad in grads
        for window in windows
    ]
    return graph.reshape(_concat(graph, sums, 1), shape)


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
