"""Look-ups by integer tensors: embedding, gather, scatter."""

from __future__ import annotations

from collections.abc import Sequence

from reft_edge.compile.graph import Value
from reft_edge.compile.lowering import Lowering, NodePair, rule
from reft_edge.errors import ModelError


@rule("aten::embedding")
def _embedding(low: Lowering, pair: NodePair, weight: Value, indices: Value, *_: object) -> Value:
    return low.graph.op("Gather", weight, indices, shape=pair.shape, axis=0)


@rule("aten::embedding_dense_backward")
def _embedding_backward(
    low: Lowering, pair: NodePair, grad: Value, indices: Value, n_rows: int, padding: int, by_frequency: bool
) -> Value:
    if by_frequency:
        raise ModelError("an embedding with scale_grad_by_freq cannot be compiled; switch it off")
    graph = low.graph
    if padding >= 0:
        kept = graph.pointwise("Equal", indices, graph.scalar(padding, indices.dtype), dtype="bool")
        mask = graph.cast(graph.pointwise("Not", kept), grad.dtype)
        grad = graph.pointwise("Mul", grad, graph.reshape(mask, (*indices.shape, 1)))
    zeros = graph.expand(graph.scalar(0, grad.dtype), (n_rows, grad.shape[-1]))
    places = graph.reshape(indices, (*indices.shape, 1))
    return graph.op("ScatterND", zeros, places, grad, shape=pair.shape, reduction="add")


@rule("aten::index.Tensor")
def _index(low: Lowering, pair: NodePair, x: Value, indices: Sequence[Value | None]) -> Value:
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or used[0][1].dtype not in ("int64", "int32"):
        raise ModelError("only indexing by one tensor of integers can be compiled")
    axis, index = used[0]
    return low.graph.op("Gather", x, index, shape=pair.shape, axis=axis)


@rule("aten::index_select")
def _index_select(low: Lowering, pair: NodePair, x: Value, dim: int, index: Value) -> Value:
    return low.graph.op("Gather", x, index, shape=pair.shape, axis=dim % x.rank)


@rule("aten::index_put", "aten::_unsafe_index_put")
def _index_put(
    low: Lowering, pair: NodePair, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> Value:
    if len(indices) != 1 or indices[0] is None:
        raise ModelError("only writing by one tensor of row numbers can be compiled")
    index = indices[0]
    graph = low.graph
    updates = graph.expand(values, (*index.shape, *x.shape[1:]))
    places = graph.reshape(index, (*index.shape, 1))
    return graph.op("ScatterND", x, places, updates, shape=pair.shape, reduction="add" if accumulate else "none")


@rule("aten::gather")
def _gather(low: Lowering, _: NodePair, x: Value, dim: int, index: Value, *__: object) -> Value:
    return low.graph.op("GatherElements", x, index, shape=index.shape, axis=dim % x.rank)


@rule("aten::scatter_add")
def _scatter_add(low: Lowering, _: NodePair, x: Value, dim: int, index: Value, source: Value) -> Value:
    return low.graph.op("ScatterElements", x, index, source, shape=x.shape, axis=dim % x.rank, reduction="add")
