"""Elementwise operators: arithmetic, comparison, activations and their derivatives.

Expanded operands stay small here: ONNX broadcasts as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.lowering import Lowering, NodePair, rule
from reft_edge.compile.symbols import Affine
from reft_edge.errors import ModelError

Operand: TypeAlias = Value | float | Affine


def operand(graph: GraphBuilder, value: Operand, dtype: str) -> Value:
    """A tensor or number as a tensor of `dtype`."""
    if isinstance(value, Value):
        return graph.cast(value, dtype)
    return graph.number(value, dtype)


def _computing_dtype(pair: NodePair, *operands: Operand) -> str:
    """The dtype in which torch compares: that of the tensors (the result's is bool)."""
    dtypes = {value.dtype for value in operands if isinstance(value, Value)}
    if any(isinstance(value, float) and not value.is_integer() for value in operands):
        dtypes |= {"float32"}
    for dtype in ("float32", "int64", "int32"):
        if dtype in dtypes:
            return dtype
    return dtypes.pop() if dtypes else pair.dtype


def _unary(*operators: str, op_type: str) -> None:
    @rule(*operators, broadcasts=True)
    def lower(low: Lowering, pair: NodePair, x: Value, *_: object) -> Value:
        return low.graph.pointwise(op_type, low.graph.cast(x, pair.dtype))


def _binary(*operators: str, op_type: str) -> None:
    @rule(*operators, broadcasts=True)
    def lower(low: Lowering, pair: NodePair, a: Operand, b: Operand, *_: object) -> Value:
        return low.graph.pointwise(op_type, operand(low.graph, a, pair.dtype), operand(low.graph, b, pair.dtype))


def _comparison(*operators: str, op_type: str) -> None:
    @rule(*operators, broadcasts=True)
    def lower(low: Lowering, pair: NodePair, a: Operand, b: Operand) -> Value:
        dtype = _computing_dtype(pair, a, b)
        return low.graph.pointwise(op_type, operand(low.graph, a, dtype), operand(low.graph, b, dtype), dtype="bool")


for _name in [
    "abs",
    "ceil",
    "cos",
    "erf",
    "exp",
    "floor",
    "log",
    "neg",
    "reciprocal",
    "round",
    "sigmoid",
    "sign",
    "sin",
    "sqrt",
    "tanh",
]:
    _unary(f"aten::{_name}", op_type=_name.capitalize())
_unary("aten::relu", op_type="Relu")
_binary("aten::mul.Tensor", "aten::mul.Scalar", op_type="Mul")
_binary("aten::div.Tensor", "aten::div.Scalar", op_type="Div")
_binary("aten::pow.Tensor_Tensor", op_type="Pow")
_binary("aten::maximum", "aten::clamp_min", op_type="Max")
_binary("aten::minimum", "aten::clamp_max", op_type="Min")
_comparison("aten::eq.Tensor", "aten::eq.Scalar", op_type="Equal")
_comparison("aten::lt.Tensor", "aten::lt.Scalar", op_type="Less")
_comparison("aten::le.Tensor", "aten::le.Scalar", op_type="LessOrEqual")
_comparison("aten::gt.Tensor", "aten::gt.Scalar", op_type="Greater")
_comparison("aten::ge.Tensor", "aten::ge.Scalar", op_type="GreaterOrEqual")


@rule("aten::ne.Tensor", "aten::ne.Scalar", broadcasts=True)
def _not_equal(low: Lowering, pair: NodePair, a: Operand, b: Operand) -> Value:
    dtype = _computing_dtype(pair, a, b)
    equal = low.graph.pointwise("Equal", operand(low.graph, a, dtype), operand(low.graph, b, dtype), dtype="bool")
    return low.graph.pointwise("Not", equal)


@rule("aten::logical_not", "aten::bitwise_not", broadcasts=True)
def _not(low: Lowering, _: NodePair, x: Value) -> Value:
    return low.graph.pointwise("Not", low.graph.cast(x, "bool"))


def _logical(*operators: str, op_type: str) -> None:
    @rule(*operators, broadcasts=True)
    def lower(low: Lowering, pair: NodePair, a: Operand, b: Operand) -> Value:
        if pair.dtype != "bool":
            raise ModelError("bitwise operators are compiled for booleans only")
        return low.graph.pointwise(op_type, operand(low.graph, a, "bool"), operand(low.graph, b, "bool"))


_logical("aten::logical_and", "aten::bitwise_and.Tensor", "aten::bitwise_and.Scalar", op_type="And")
_logical("aten::logical_or", "aten::bitwise_or.Tensor", "aten::bitwise_or.Scalar", op_type="Or")
_logical("aten::logical_xor", "aten::bitwise_xor.Tensor", op_type="Xor")


@rule("aten::add.Tensor", "aten::add.Scalar", broadcasts=True)
def _add(low: Lowering, pair: NodePair, a: Operand, b: Operand, alpha: float = 1) -> Value:
    return _plus(low, pair, "Add", a, b, alpha)


@rule("aten::sub.Tensor", "aten::sub.Scalar", broadcasts=True)
def _sub(low: Lowering, pair: NodePair, a: Operand, b: Operand, alpha: float = 1) -> Value:
    return _plus(low, pair, "Sub", a, b, alpha)


@rule("aten::rsub.Tensor", "aten::rsub.Scalar", broadcasts=True)
def _reverse_sub(low: Lowering, pair: NodePair, a: Operand, b: Operand, alpha: float = 1) -> Value:
    graph = low.graph
    scaled = operand(graph, a, pair.dtype)
    if alpha != 1:
        scaled = graph.pointwise("Mul", scaled, graph.scalar(alpha, pair.dtype))
    return graph.pointwise("Sub", operand(graph, b, pair.dtype), scaled)


def _plus(low: Lowering, pair: NodePair, op_type: str, a: Operand, b: Operand, alpha: float) -> Value:
    graph = low.graph
    second = operand(graph, b, pair.dtype)
    if alpha != 1:
        second = graph.pointwise("Mul", second, graph.scalar(alpha, pair.dtype))
    return graph.pointwise(op_type, operand(graph, a, pair.dtype), second)


@rule("aten::rsqrt", broadcasts=True)
def _rsqrt(low: Lowering, _: NodePair, x: Value) -> Value:
    return low.graph.pointwise("Reciprocal", low.graph.pointwise("Sqrt", x))


@rule("aten::log1p", "aten::expm1", broadcasts=True)
def _near_one(low: Lowering, pair: NodePair, x: Value) -> Value:
    one = low.graph.scalar(1, x.dtype)
    if "log1p" in str(pair.small.target):
        return low.graph.pointwise("Log", low.graph.pointwise("Add", x, one))
    return low.graph.pointwise("Sub", low.graph.pointwise("Exp", x), one)


@rule("aten::pow.Tensor_Scalar", broadcasts=True)
def _power(low: Lowering, _: NodePair, x: Value, exponent: float) -> Value:
    if exponent == 2:
        return low.graph.pointwise("Mul", x, x)
    return low.graph.pointwise("Pow", x, low.graph.scalar(exponent, x.dtype))


@rule("aten::pow.Scalar", broadcasts=True)
def _exponential(low: Lowering, pair: NodePair, base: float, x: Value) -> Value:
    return low.graph.pointwise("Pow", low.graph.scalar(base, pair.dtype), low.graph.cast(x, pair.dtype))


@rule("aten::div.Tensor_mode", "aten::div.Scalar_mode", broadcasts=True)
def _rounding_division(low: Lowering, pair: NodePair, a: Operand, b: Operand, rounding_mode: str | None) -> Value:
    graph = low.graph
    result = graph.pointwise("Div", operand(graph, a, pair.dtype), operand(graph, b, pair.dtype))
    if rounding_mode is None or (rounding_mode == "trunc" and pair.dtype.startswith("int")):
        return result
    if rounding_mode == "floor" and pair.dtype == "float32":
        return graph.pointwise("Floor", result)
    raise ModelError(f"division with rounding {rounding_mode!r} of {pair.dtype} cannot be compiled")


@rule("aten::clamp", "aten::clamp.Tensor", "aten::hardtanh", broadcasts=True)
def _clamp(
    low: Lowering, pair: NodePair, x: Value, low_end: Operand | None = None, high_end: Operand | None = None
) -> Value:
    graph = low.graph
    result = graph.cast(x, pair.dtype)
    if isinstance(low_end, int | float) and isinstance(high_end, int | float):
        ends = (graph.scalar(low_end, pair.dtype), graph.scalar(high_end, pair.dtype))
        return graph.op("Clip", result, *ends, shape=result.shape)
    if low_end is not None:
        result = graph.pointwise("Max", result, operand(graph, low_end, pair.dtype))
    if high_end is not None:
        result = graph.pointwise("Min", result, operand(graph, high_end, pair.dtype))
    return result


@rule("aten::where.self", "aten::where.ScalarOther", "aten::where.ScalarSelf", "aten::where.Scalar", broadcasts=True)
def _where(low: Lowering, pair: NodePair, condition: Value, a: Operand, b: Operand) -> Value:
    return select(low.graph, condition, operand(low.graph, a, pair.dtype), operand(low.graph, b, pair.dtype))


def select(graph: GraphBuilder, condition: Value, a: Value, b: Value) -> Value:
    """Where: entries of `a` where the condition holds, else of `b`."""
    return graph.pointwise("Where", condition, a, b, dtype=a.dtype)


@rule("aten::masked_fill.Scalar", "aten::masked_fill.Tensor", broadcasts=True)
def _masked_fill(low: Lowering, pair: NodePair, x: Value, mask: Value, fill: Operand) -> Value:
    return select(low.graph, mask, operand(low.graph, fill, pair.dtype), x)


def keep_where(graph: GraphBuilder, x: Value, condition: Value) -> Value:
    """`x` where the condition holds, else zero."""
    return graph.pointwise("Mul", x, graph.cast(condition, x.dtype))


def positive(graph: GraphBuilder, rectified: Value) -> Value:
    """1 where a rectified tensor is above zero, else 0: ReLU's derivative. Sign takes five times as long."""
    return graph.op("HardSigmoid", rectified, shape=rectified.shape, alpha=3e38, beta=0.0)


@rule("aten::threshold_backward", broadcasts=True)
def _threshold_backward(low: Lowering, _: NodePair, grad: Value, x: Value, threshold: float) -> Value:
    graph = low.graph
    producer = graph.producer(x)
    if threshold == 0 and producer is not None and producer.op_type == "Relu":
        if (grad.name, x.name) in low.rectified:
            return grad
        return graph.pointwise("Mul", grad, positive(graph, x))
    return keep_where(graph, grad, graph.pointwise("Greater", x, graph.scalar(threshold, x.dtype), dtype="bool"))


@rule("aten::hardtanh_backward", broadcasts=True)
def _hardtanh_backward(low: Lowering, _: NodePair, grad: Value, x: Value, low_end: float, high_end: float) -> Value:
    graph = low.graph
    above = graph.pointwise("Greater", x, graph.scalar(low_end, x.dtype), dtype="bool")
    below = graph.pointwise("Less", x, graph.scalar(high_end, x.dtype), dtype="bool")
    return keep_where(graph, grad, graph.pointwise("And", above, below))


@rule("aten::leaky_relu", broadcasts=True)
def _leaky_relu(low: Lowering, _: NodePair, x: Value, slope: float) -> Value:
    return low.graph.op("LeakyRelu", x, shape=x.shape, alpha=float(slope))


@rule("aten::leaky_relu_backward", broadcasts=True)
def _leaky_relu_backward(low: Lowering, _: NodePair, grad: Value, x: Value, slope: float, *__: object) -> Value:
    graph = low.graph
    positive = graph.pointwise("Greater", x, graph.scalar(0, x.dtype), dtype="bool")
    return graph.pointwise("Mul", grad, select(graph, positive, graph.scalar(1, x.dtype), graph.scalar(slope, x.dtype)))


@rule("aten::elu", broadcasts=True)
def _elu(low: Lowering, _: NodePair, x: Value, alpha: float, scale: float, input_scale: float) -> Value:
    graph = low.graph
    curve = graph.pointwise("Exp", graph.pointwise("Mul", x, graph.scalar(input_scale, x.dtype)))
    curve = graph.pointwise("Sub", curve, graph.scalar(1, x.dtype))
    negative = graph.pointwise("Mul", curve, graph.scalar(alpha * scale, x.dtype))
    positive = graph.pointwise("Greater", x, graph.scalar(0, x.dtype), dtype="bool")
    return select(graph, positive, graph.pointwise("Mul", x, graph.scalar(scale, x.dtype)), negative)


@rule("aten::elu_backward", broadcasts=True)
def _elu_backward(
    low: Lowering, _: NodePair, grad: Value, alpha: float, scale: float, input_scale: float, is_result: bool, x: Value
) -> Value:
    """Slope: scale above zero, else scale * input_scale * alpha * exp(input_scale * x)."""
    graph = low.graph
    if is_result:
        raise ModelError("an ELU in place cannot be compiled; use inplace=False")
    curve = graph.pointwise("Exp", graph.pointwise("Mul", x, graph.scalar(input_scale, x.dtype)))
    negative = graph.pointwise("Mul", curve, graph.scalar(scale * input_scale * alpha, x.dtype))
    positive = graph.pointwise("Greater", x, graph.scalar(0, x.dtype), dtype="bool")
    return graph.pointwise("Mul", grad, select(graph, positive, graph.scalar(scale, x.dtype), negative))


@rule("aten::silu", broadcasts=True)
def _silu(low: Lowering, _: NodePair, x: Value) -> Value:
    return low.graph.pointwise("Mul", x, low.graph.pointwise("Sigmoid", x))


@rule("aten::silu_backward", broadcasts=True)
def _silu_backward(low: Lowering, _: NodePair, grad: Value, x: Value) -> Value:
    """grad * s * (1 + x * (1 - s)) with s = sigmoid(x)."""
    graph = low.graph
    one = graph.scalar(1, x.dtype)
    sigmoid = graph.pointwise("Sigmoid", x)
    inner = graph.pointwise("Add", one, graph.pointwise("Mul", x, graph.pointwise("Sub", one, sigmoid)))
    return graph.pointwise("Mul", graph.pointwise("Mul", grad, sigmoid), inner)


@rule("aten::sigmoid_backward", broadcasts=True)
def _sigmoid_backward(low: Lowering, _: NodePair, grad: Value, y: Value) -> Value:
    graph = low.graph
    return _product(graph, grad, y, graph.pointwise("Sub", graph.scalar(1, y.dtype), y))


@rule("aten::tanh_backward", broadcasts=True)
def _tanh_backward(low: Lowering, _: NodePair, grad: Value, y: Value) -> Value:
    graph = low.graph
    return _product(graph, grad, graph.pointwise("Sub", graph.scalar(1, y.dtype), graph.pointwise("Mul", y, y)))


def _sigmoid_slope(graph: GraphBuilder, x: Value) -> Callable[[str], Value]:
    def compare(op_type: str) -> Value:
        end = -3.0 if op_type == "Greater" else 3.0
        return graph.pointwise(op_type, x, graph.scalar(end, x.dtype), dtype="bool")

    return compare


@rule("aten::hardswish", broadcasts=True)
def _hardswish(low: Lowering, _: NodePair, x: Value) -> Value:
    return low.graph.pointwise("Mul", x, _hardsigmoid(low.graph, x))


def _hardsigmoid(graph: GraphBuilder, x: Value) -> Value:
    return graph.op("HardSigmoid", x, shape=x.shape, alpha=1 / 6, beta=0.5)


@rule("aten::hardsigmoid", broadcasts=True)
def _hardsigmoid_rule(low: Lowering, _: NodePair, x: Value) -> Value:
    return _hardsigmoid(low.graph, x)


@rule("aten::hardsigmoid_backward", broadcasts=True)
def _hardsigmoid_backward(low: Lowering, _: NodePair, grad: Value, x: Value) -> Value:
    graph = low.graph
    compare = _sigmoid_slope(graph, x)
    inside = graph.pointwise("And", compare("Greater"), compare("Less"))
    return graph.pointwise("Mul", keep_where(graph, grad, inside), graph.scalar(1 / 6, x.dtype))


@rule("aten::hardswish_backward", broadcasts=True)
def _hardswish_backward(low: Lowering, _: NodePair, grad: Value, x: Value) -> Value:
    """Derivative: 0 below -3, x/3 + 1/2 between, 1 above 3."""
    graph = low.graph
    compare = _sigmoid_slope(graph, x)
    line = graph.pointwise("Add", graph.pointwise("Mul", x, graph.scalar(1 / 3, x.dtype)), graph.scalar(0.5, x.dtype))
    upper = select(graph, compare("Less"), line, graph.scalar(1, x.dtype))
    return graph.pointwise("Mul", grad, select(graph, compare("Greater"), upper, graph.scalar(0, x.dtype)))


_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715
"""Constants of GELU (Hendrycks and Gimpel, arXiv 1606.08415), exact and in the tanh approximation."""


def _normal_cdf(graph: GraphBuilder, x: Value) -> Value:
    erf = graph.pointwise("Erf", graph.pointwise("Mul", x, graph.scalar(_SQRT_HALF, x.dtype)))
    half = graph.scalar(0.5, x.dtype)
    return graph.pointwise("Add", graph.pointwise("Mul", erf, half), half)


def _gelu_tanh(graph: GraphBuilder, x: Value, square: Value) -> Value:
    """tanh(sqrt(2/pi) * (x + 0.044715 x^3))."""
    cubic = graph.pointwise(
        "Add", graph.pointwise("Mul", square, graph.scalar(_TANH_CUBIC, x.dtype)), graph.scalar(1, x.dtype)
    )
    return graph.pointwise("Tanh", _product(graph, x, cubic, graph.scalar(_TANH_SCALE, x.dtype)))


@rule("aten::gelu", broadcasts=True)
def _gelu(low: Lowering, _: NodePair, x: Value, approximate: str) -> Value:
    graph = low.graph
    if approximate == "none":
        return graph.pointwise("Mul", x, _normal_cdf(graph, x))
    tanh = _gelu_tanh(graph, x, graph.pointwise("Mul", x, x))
    half = graph.pointwise("Mul", x, graph.scalar(0.5, x.dtype))
    return graph.pointwise("Mul", half, graph.pointwise("Add", tanh, graph.scalar(1, x.dtype)))


@rule("aten::gelu_backward", broadcasts=True)
def _gelu_backward(low: Lowering, _: NodePair, grad: Value, x: Value, approximate: str) -> Value:
    graph = low.graph
    square = graph.pointwise("Mul", x, x)
    one, half = graph.scalar(1, x.dtype), graph.scalar(0.5, x.dtype)
    if approximate == "none":
        exponential = graph.pointwise("Exp", graph.pointwise("Mul", square, graph.scalar(-0.5, x.dtype)))
        density = graph.pointwise("Mul", exponential, graph.scalar(1 / math.sqrt(2 * math.pi), x.dtype))
        slope = graph.pointwise("Add", _normal_cdf(graph, x), graph.pointwise("Mul", x, density))
        return graph.pointwise("Mul", grad, slope)
    tanh = _gelu_tanh(graph, x, square)
    inner = graph.pointwise("Add", graph.pointwise("Mul", square, graph.scalar(3 * _TANH_CUBIC, x.dtype)), one)
    rise = graph.pointwise("Sub", one, graph.pointwise("Mul", tanh, tanh))
    curved = _product(graph, x, rise, inner, graph.scalar(_TANH_SCALE, x.dtype))
    slope = graph.pointwise("Add", graph.pointwise("Add", tanh, one), curved)
    return _product(graph, grad, slope, half)


def _product(graph: GraphBuilder, first: Value, *others: Value) -> Value:
    for other in others:
        first = graph.pointwise("Mul", first, other)
    return first


@rule("aten::_to_copy", "prims::convert_element_type", broadcasts=True)
def _to_copy(low: Lowering, pair: NodePair, x: Value, *_: object) -> Value:
    return low.graph.cast(x, pair.dtype)
