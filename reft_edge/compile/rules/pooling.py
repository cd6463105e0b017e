"""Max, average and adaptive average pooling, and their derivatives.

torch and onnxruntime disagree about windows that hang over the edge (ceil_mode) and how many entries an average counts.
So the output size is always torch's, reached by padding behind, and averages are corrected by a constant that holds one
number an output position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast, batch_first, batch_last, behind
from reft_edge.compile.lowering import Lowering, NodePair, Tensor, rule
from reft_edge.compile.rules import batch_last_pooling
from reft_edge.compile.rules.shapes import pad_zero
from reft_edge.compile.symbols import Affine, Dim, Shape, n_elements
from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from reft_edge.types import FloatArray


@dataclass(frozen=True)
class Windows:
    """Where pooling windows lie along each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        n_axes: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int] = (1,),
    ) -> Windows:
        """Single numbers hold for all axes; without a stride it is the kernel's size."""

        def each(numbers: Sequence[int]) -> tuple[int, ...]:
            return tuple(numbers) if len(numbers) == n_axes else tuple(numbers) * n_axes

        return cls(each(kernel), each(stride or kernel), each(padding), each(dilation))

    def behind(self, inputs: Sequence[int], outputs: Sequence[int]) -> tuple[int, ...]:
        """Padding behind each axis with which exactly `outputs` windows fit."""
        reach = [
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(outputs, self.stride, self.dilation, self.kernel, strict=True)
        ]
        return tuple(max(r - size - p, 0) for r, size, p in zip(reach, inputs, self.padding, strict=True))

    @property
    def disjoint(self) -> bool:
        """Whether no entry is in two windows."""
        return all(s >= d * (k - 1) + 1 for s, d, k in zip(self.stride, self.dilation, self.kernel, strict=True))


def _spatial(x: Value, n_axes: int) -> tuple[int, ...]:
    sizes = [dim for dim in x.shape[x.rank - n_axes :] if not isinstance(dim, Affine)]
    if len(sizes) != n_axes:
        raise ModelError("pooling over the batch axis cannot be compiled")
    return tuple(sizes)


def _batched(graph: GraphBuilder, x: Value, n_axes: int) -> Value:
    """`x` with a channel axis of its own: (n_batch, channels, *positions)."""
    return x if x.rank == n_axes + 2 else graph.reshape(x, (*((1,) * (n_axes + 2 - x.rank)), *x.shape))


def _max_pool(low: Lowering, pair: NodePair, x: Value, windows: Windows, index: int | None) -> tuple[Value, Value]:
    graph = low.graph
    n_axes = len(windows.kernel)
    shape, dtype = pair.output(index)
    batched = _batched(graph, x, n_axes)
    out = (*batched.shape[:2], *shape[-n_axes:])
    behind = windows.behind(_spatial(x, n_axes), [dim for dim in shape[-n_axes:] if not isinstance(dim, Affine)])
    pooled, places = graph.node(
        "MaxPool",
        [batched],
        [(out, dtype), (out, "int64")],
        kernel_shape=windows.kernel,
        strides=windows.stride,
        pads=(*windows.padding, *behind),
        dilations=windows.dilation,
    )
    return graph.reshape(pooled, shape), places


@rule("aten::max_pool2d_with_indices", any_layout=True)
def _max_pool2d(
    low: Lowering,
    pair: NodePair,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Value]:
    """The places are onnxruntime's: positions in the whole flattened input, which only the derivative below reads."""
    windows = Windows.of(2, kernel, stride, padding, dilation)
    if isinstance(x, BatchLast):
        if _halves(windows, ceil_mode):
            return batch_last_pooling.pool(low.graph, x.stored, behind(pair.output(0)[0]))
        x = batch_first(low.graph, x)
    return _max_pool(low, pair, x, windows, 0)


def _halves(windows: Windows, ceil_mode: bool) -> bool:
    """Whether the windows are two by two and each begins where another ends."""
    twos = (2, 2)
    return (windows.kernel, windows.stride, windows.padding) == (twos, twos, (0, 0)) and not ceil_mode


@rule("aten::max_pool1d")
def _max_pool1d(
    low: Lowering,
    pair: NodePair,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Value:
    del ceil_mode
    return _max_pool(low, pair, x, Windows.of(1, kernel, stride, padding, dilation), None)[0]


@rule("aten::max_pool2d_with_indices_backward", any_layout=True)
def _max_pool2d_backward(
    low: Lowering,
    pair: NodePair,
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    places: Value,
) -> Tensor:
    """Each gradient goes to the place where its window had its maximum."""
    del pair
    graph = low.graph
    windows = Windows.of(2, kernel, stride, padding, dilation)
    if isinstance(x, BatchLast):
        if _halves(windows, ceil_mode):
            spread = batch_last_pooling.unpool(graph, batch_last(graph, grad), x.stored)
            if batch_last_pooling.rectified(graph, x.stored) is not None:
                low.rectified.add((spread.name, x.stored.name))
            return BatchLast(spread)
        x = batch_first(graph, x)
    grad = batch_first(graph, grad) if isinstance(grad, BatchLast) else grad
    if windows.disjoint:
        batched = _batched(graph, x, 2)
        shape = graph.op("Shape", batched, shape=(batched.rank,), dtype="int64")
        rows = graph.reshape(grad, places.shape)
        unpooled = graph.op(
            "MaxUnpool", rows, places, shape, shape=batched.shape, kernel_shape=windows.kernel, strides=windows.stride
        )
        return graph.reshape(unpooled, x.shape)
    flat: Shape = (n_elements(grad.shape),)
    zeros = graph.expand(graph.scalar(0, grad.dtype), (n_elements(x.shape),))
    operands = (zeros, graph.reshape(places, flat), graph.reshape(grad, flat))
    summed = graph.op("ScatterElements", *operands, shape=zeros.shape, axis=0, reduction="add")
    return graph.reshape(summed, x.shape)


def _counts(
    inputs: Sequence[int], outputs: Sequence[int], windows: Windows, include_padding: bool, divisor: int | None
) -> FloatArray:
    """What torch divides each window's sum by: float32 (*outputs)."""
    counts = np.ones((), np.float32)
    for size, n, k, s, p in zip(inputs, outputs, windows.kernel, windows.stride, windows.padding, strict=True):
        starts = np.arange(n) * s - p
        ends = np.minimum(starts + k, size + p)
        along = ends - starts if include_padding else np.minimum(ends, size) - np.maximum(starts, 0)
        counts = np.multiply.outer(counts, along.astype(np.float32))
    return np.full_like(counts, divisor) if divisor else counts


@rule("aten::avg_pool2d", "aten::avg_pool1d")
def _avg_pool(
    low: Lowering,
    pair: NodePair,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    include_padding: bool = True,
    divisor: int | None = None,
) -> Value:
    del ceil_mode
    graph = low.graph
    n_axes = 1 if "avg_pool1d" in str(pair.small.target) else 2
    windows = Windows.of(n_axes, kernel, stride, padding)
    shape = pair.shape
    inputs, outputs = _spatial(x, n_axes), [dim for dim in shape[-n_axes:] if not isinstance(dim, Affine)]
    batched = _batched(graph, x, n_axes)
    behind = windows.behind(inputs, outputs)
    before: list[Dim] = [0, 0, *windows.padding]
    padded = pad_zero(graph, batched, before, [0, 0, *behind])
    pooled = graph.op(
        "AveragePool",
        padded,
        shape=(*batched.shape[:2], *outputs),
        kernel_shape=windows.kernel,
        strides=windows.stride,
    )
    correction = np.float32(np.prod(windows.kernel)) / _counts(inputs, outputs, windows, include_padding, divisor)
    if np.any(correction != 1):
        pooled = graph.pointwise("Mul", pooled, graph.constant(correction))
    return graph.reshape(pooled, shape)


@rule("aten::avg_pool2d_backward")
def _avg_pool_backward(
    low: Lowering,
    pair: NodePair,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    include_padding: bool,
    divisor: int | None,
) -> Value:
    """Spread each gradient evenly over its window: a transposed convolution with a kernel of ones."""
    del pair, ceil_mode
    graph = low.graph
    windows = Windows.of(2, kernel, stride, padding)
    inputs, outputs = _spatial(x, 2), _spatial(grad, 2)
    counts = _counts(inputs, outputs, windows, include_padding, divisor)
    shares = graph.pointwise("Mul", grad, graph.constant(np.float32(1) / counts))
    images = graph.reshape(shares, (n_elements(grad.shape[:-2]), 1, *outputs))
    spread = [(n - 1) * s + k for n, s, k in zip(outputs, windows.stride, windows.kernel, strict=True)]
    ones = graph.constant(np.ones((1, 1, *windows.kernel), np.float32))
    whole = graph.op(
        "ConvTranspose",
        images,
        ones,
        shape=(images.shape[0], 1, *spread),
        kernel_shape=windows.kernel,
        strides=windows.stride,
    )
    before: list[Dim] = [0, 0, *(-p for p in windows.padding)]
    after: list[Dim] = [0, 0, *(size - s + p for size, s, p in zip(inputs, spread, windows.padding, strict=True))]
    return graph.reshape(pad_zero(graph, whole, before, after), x.shape)


def _averaging_matrix(size: int, n_windows: int) -> FloatArray:
    """Rows that average entries floor(i*size/n) to ceil((i+1)*size/n): float32 (n_windows, size)."""
    matrix = np.zeros((n_windows, size), np.float32)
    for row in range(n_windows):
        start, end = row * size // n_windows, -(-(row + 1) * size // n_windows)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


@rule("aten::_adaptive_avg_pool2d")
def _adaptive_avg_pool(low: Lowering, pair: NodePair, x: Value, output_size: Sequence[int]) -> Value:
    """Two matrix products with constant averaging matrices, one an axis."""
    graph = low.graph
    height, width = _spatial(x, 2)
    rows, columns = output_size
    down, across = _averaging_matrix(height, rows), _averaging_matrix(width, columns)
    half = graph.op("MatMul", graph.constant(down), x, shape=(*x.shape[:-2], rows, width), dtype=x.dtype)
    return graph.op("MatMul", half, graph.constant(np.ascontiguousarray(across.T)), shape=pair.shape)


@rule("aten::_adaptive_avg_pool2d_backward")
def _adaptive_avg_pool_backward(low: Lowering, _: NodePair, grad: Value, x: Value) -> Value:
    graph = low.graph
    height, width = _spatial(x, 2)
    rows, columns = _spatial(grad, 2)
    down, across = _averaging_matrix(height, rows), _averaging_matrix(width, columns)
    up = graph.constant(np.ascontiguousarray(down.T))
    half = graph.op("MatMul", up, grad, shape=(*x.shape[:-2], height, columns), dtype=x.dtype)
    return graph.op("MatMul", half, graph.constant(across), shape=x.shape)
