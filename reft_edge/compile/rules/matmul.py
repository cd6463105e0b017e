"""Matrix products. A transposed matrix becomes a flag of Gemm, not a copy."""

from __future__ import annotations

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.lowering import Lowering, NodePair, rule


def untransposed(graph: GraphBuilder, x: Value) -> tuple[Value, int]:
    """The matrix of which `x` is the transposition and 1, or `x` and 0."""
    producer = graph.producer(x)
    # A matrix has only one transposition that is one.
    if x.rank == 2 and producer is not None and producer.op_type == "Transpose":
        return Value(producer.input[0], x.shape[::-1], x.dtype), 1
    return x, 0


def gemm(
    graph: GraphBuilder, a: Value, b: Value, bias: Value | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Value:
    """alpha * a @ b + beta * bias for matrices."""
    shape = (a.shape[0], b.shape[1])
    (a, trans_a), (b, trans_b) = untransposed(graph, a), untransposed(graph, b)
    operands = (a, b) if bias is None else (a, b, bias)
    return graph.op("Gemm", *operands, shape=shape, alpha=alpha, beta=beta, transA=trans_a, transB=trans_b)


@rule("aten::mm")
def _mm(low: Lowering, _: NodePair, a: Value, b: Value) -> Value:
    return gemm(low.graph, a, b)


@rule("aten::addmm")
def _addmm(low: Lowering, _: NodePair, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    return gemm(low.graph, a, b, bias, alpha=float(alpha), beta=float(beta))


@rule("aten::bmm", "aten::mv", "aten::dot")
def _bmm(low: Lowering, pair: NodePair, a: Value, b: Value) -> Value:
    return low.graph.op("MatMul", a, b, shape=pair.shape)


@rule("aten::baddbmm")
def _baddbmm(low: Lowering, pair: NodePair, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    graph = low.graph
    product = graph.op("MatMul", a, b, shape=pair.shape)
    if alpha != 1:
        product = graph.pointwise("Mul", product, graph.scalar(alpha, a.dtype))
    if beta != 1:
        c = graph.pointwise("Mul", c, graph.scalar(beta, a.dtype))
    return graph.pointwise("Add", c, product)
