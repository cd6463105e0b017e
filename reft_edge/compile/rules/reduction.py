"""Sums, means and extrema over axes; softmax and its derivative."""

from __future__ import annotations

from collections.abc import Sequence

from reft_edge.compile.graph import Value
from reft_edge.compile.layout import BatchLast, batch_first
from reft_edge.compile.lowering import Lowering, NodePair, Tensor, rule


def _axes(x: Tensor, dims: Sequence[int] | int | None) -> list[int]:
    if isinstance(dims, int):
        dims = [dims]
    return sorted(dim % x.rank for dim in dims) if dims else list(range(x.rank))


def _reduction(*operators: str, op_type: str) -> None:
    @rule(*operators, any_layout=True)
    def lower(
        low: Lowering,
        pair: NodePair,
        x: Tensor,
        dims: Sequence[int] | int | None = None,
        keepdim: object = False,
        *_: object,
    ) -> Tensor:
        if isinstance(x, BatchLast):
            axes = _axes(x, dims)
            if 0 not in axes:
                stored = low.graph.cast(x.stored, pair.dtype)
                inner = [axis - 1 for axis in axes]
                return BatchLast(low.graph.reduce(op_type, stored, inner, keepdims=keepdim is True))
            x = batch_first(low.graph, x)
        return low.graph.reduce(op_type, low.graph.cast(x, pair.dtype), _axes(x, dims), keepdims=keepdim is True)


_reduction("aten::sum.dim_IntList", op_type="ReduceSum")
_reduction("aten::mean.dim", op_type="ReduceMean")
_reduction("aten::amax", op_type="ReduceMax")
_reduction("aten::amin", op_type="ReduceMin")


@rule("aten::sum", "aten::mean")
def _all(low: Lowering, pair: NodePair, x: Value, *_: object) -> Value:
    op_type = "ReduceSum" if "sum" in str(pair.small.target) else "ReduceMean"
    return low.graph.reduce(op_type, low.graph.cast(x, pair.dtype), range(x.rank), keepdims=False)


@rule("aten::_softmax", "aten::_safe_softmax")
def _softmax(low: Lowering, _: NodePair, x: Value, dim: int, *__: object) -> Value:
    return low.graph.op("Softmax", x, shape=x.shape, axis=dim % max(x.rank, 1))


@rule("aten::_log_softmax")
def _log_softmax(low: Lowering, _: NodePair, x: Value, dim: int, *__: object) -> Value:
    return low.graph.op("LogSoftmax", x, shape=x.shape, axis=dim % max(x.rank, 1))


@rule("aten::_softmax_backward_data")
def _softmax_backward(low: Lowering, _: NodePair, grad: Value, y: Value, dim: int, *__: object) -> Value:
    """y * (grad - sum(grad * y))."""
    graph = low.graph
    inner = graph.reduce("ReduceSum", graph.pointwise("Mul", grad, y), [dim % y.rank], keepdims=True)
    return graph.pointwise("Mul", y, graph.pointwise("Sub", grad, inner))


@rule("aten::_log_softmax_backward_data")
def _log_softmax_backward(low: Lowering, _: NodePair, grad: Value, y: Value, dim: int, *__: object) -> Value:
    """grad - exp(y) * sum(grad)."""
    graph = low.graph
    total = graph.reduce("ReduceSum", grad, [dim % y.rank], keepdims=True)
    return graph.pointwise("Sub", grad, graph.pointwise("Mul", graph.pointwise("Exp", y), total))


@rule("aten::cumsum")
def _cumsum(low: Lowering, pair: NodePair, x: Value, dim: int, *_: object) -> Value:
    return low.graph.op("CumSum", low.graph.cast(x, pair.dtype), low.graph.scalar(dim % x.rank, "int64"), shape=x.shape)


@rule("aten::argmax")
def _argmax(low: Lowering, pair: NodePair, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None:
        x, dim = low.graph.reshape(x, (-1,)), 0
    return low.graph.op("ArgMax", x, shape=pair.shape, dtype="int64", axis=dim % x.rank, keepdims=int(keepdim))
