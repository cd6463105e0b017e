"""Max-pooling of windows of two by two on tensors with the batch last: (channels, height, width, n_batch).

onnxruntime's MaxPool takes 4 ns an entry when it must say where the maxima were. With the batch last the two columns of
all windows are runs of memory, and so are their two rows: both are split and compared as a whole. Bits say where the
maximum was; of equal entries it is the first, as in torch: columns before rows.

Of a rectified tensor it is the tensor itself that is pooled, and the maxima are rectified: the same values and
derivatives, for a quarter of the work.
"""

from __future__ import annotations

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast
from reft_edge.compile.rules.geometry import size_of
from reft_edge.compile.rules.pointwise import positive
from reft_edge.compile.rules.shapes import pad_zero
from reft_edge.compile.symbols import Dim, Shape, n_elements

_COLUMNS, _ROWS = 2, 1
"""Axes of a stored tensor."""


def pool(graph: GraphBuilder, x: Value, shape: Shape) -> tuple[BatchLast, Value]:
    """The maxima, stored in `shape`, and which of the two rows has them.

    `unpool` finds both comparisons made: what it needs to keep is a byte for each.
    """
    source = rectified(graph, x)
    left, right = _pairs(graph, _cut(graph, source or x, shape), _COLUMNS)
    _wins(graph, left, right)
    upper, lower = _pairs(graph, graph.pointwise("Max", left, right), _ROWS)
    maxima = graph.reshape(graph.pointwise("Max", upper, lower), shape)
    return BatchLast(maxima if source is None else graph.pointwise("Relu", maxima)), _wins(graph, upper, lower)


def rectified(graph: GraphBuilder, x: Value) -> Value | None:
    """The tensor that `x` is rectified from; None where it is from none."""
    producer = graph.producer(x)
    return None if producer is None or producer.op_type != "Relu" else graph.operand(producer, 0)


def unpool(graph: GraphBuilder, grad: Value, x: Value) -> Value:
    """Each gradient at the place where its window of `x` had its maximum, zero elsewhere and where `x` is rectified."""
    source = rectified(graph, x)
    if source is not None:
        grad = graph.pointwise("Mul", grad, positive(graph, pool(graph, x, grad.shape)[0].stored))
    left, right = _pairs(graph, _cut(graph, source or x, grad.shape), _COLUMNS)
    upper, lower = _pairs(graph, graph.pointwise("Max", left, right), _ROWS)
    by_row = _to_first_maximum(graph, graph.reshape(grad, upper.shape), upper, lower, _ROWS)
    by_column = _to_first_maximum(graph, graph.reshape(by_row, left.shape), left, right, _COLUMNS)
    whole = (x.shape[0], size_of(grad.shape[1]) * 2, size_of(grad.shape[2]) * 2, x.shape[3])
    rest: list[Dim] = [0, size_of(x.shape[1]) - size_of(whole[1]), size_of(x.shape[2]) - size_of(whole[2]), 0]
    return pad_zero(graph, graph.reshape(by_column, whole), [0] * 4, rest)


def _cut(graph: GraphBuilder, x: Value, pooled: Shape) -> Value:
    """Without the last row or column where their number is odd."""
    sizes = (size_of(pooled[1]) * 2, size_of(pooled[2]) * 2)
    return graph.slice(x, [1, 2], [0, 0], sizes, [1, 1])


def _pairs(graph: GraphBuilder, x: Value, axis: int) -> tuple[Value, Value]:
    """The first and the second of each two neighbours along an axis, with all that lies behind it on one axis."""
    half = size_of(x.shape[axis]) // 2
    run = n_elements(x.shape[axis + 1 :])
    split = graph.reshape(x, (*x.shape[:axis], half, 2 * run))
    first, second = graph.node(
        "Split", [split], [((*x.shape[:axis], half, run), x.dtype)] * 2, axis=axis + 1, num_outputs=2
    )
    shape = (*x.shape[:axis], half, *x.shape[axis + 1 :])
    return graph.reshape(first, shape), graph.reshape(second, shape)


def _wins(graph: GraphBuilder, first: Value, second: Value) -> Value:
    return graph.pointwise("GreaterOrEqual", first, second, dtype="bool")


def _to_first_maximum(graph: GraphBuilder, grad: Value, first: Value, second: Value, axis: int) -> Value:
    """Neighbours along an axis, of which one has the gradient and the other zero."""
    to_first = graph.pointwise("Mul", grad, graph.cast(_wins(graph, first, second), grad.dtype))
    to_second = graph.pointwise("Sub", grad, to_first)
    shape = (*grad.shape[: axis + 1], n_elements(grad.shape[axis + 1 :]))
    both = [graph.reshape(half, shape) for half in (to_first, to_second)]
    return graph.op("Concat", *both, shape=(*shape[:-1], 2 * shape[-1]), axis=axis + 1)
