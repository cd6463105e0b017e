"""Tensors out of nothing: constants, ranges, and the random numbers of dropout.

Filled tensors stay scalars until an operator needs them written out, so no constant of activation size gets into a
graph.

Randomness is a counter-based generator: a 32-bit integer hash of (seed, operator, element), after the finalisers of
MurmurHash3. ONNX's own RandomUniform takes its seed from the file and not from an input, so a run could not be
reproduced from the step's seed.
"""

from __future__ import annotations

import numpy as np

from reft_edge.compile.graph import Value
from reft_edge.compile.lowering import Lowering, NodePair, rule
from reft_edge.compile.symbols import Affine, n_elements
from reft_edge.errors import ModelError

SEED = "seed"

_MASK = 2**32 - 1
_MULTIPLIERS = (0x7FEB352D, 0x2C1B3C6D)
"""Odd and below 2^31, so that a product with a 32-bit number fits a signed 64-bit integer."""


@rule("aten::full", "aten::full_like", "aten::new_full", broadcasts=True)
def _full(low: Lowering, pair: NodePair, _: object, *rest: object) -> Value:
    fill = rest[0] if "new_full" not in str(pair.small.target) else rest[1]
    return low.graph.number(fill, pair.dtype)  # type: ignore[arg-type]


@rule(
    *("aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::zero"),
    *(
        "aten::empty.memory_format",
        "aten::empty_like",
        "aten::new_empty",
        "aten::empty_strided",
        "aten::new_empty_strided",
    ),
    broadcasts=True,
)
def _zeros(low: Lowering, pair: NodePair, *_: object) -> Value:
    return low.graph.scalar(0, pair.dtype)


@rule("aten::ones", "aten::ones_like", "aten::new_ones", broadcasts=True)
def _ones(low: Lowering, pair: NodePair, *_: object) -> Value:
    return low.graph.scalar(1, pair.dtype)


@rule("aten::fill.Scalar", broadcasts=True)
def _fill(low: Lowering, pair: NodePair, _: Value, fill: float) -> Value:
    return low.graph.number(fill, pair.dtype)


@rule("aten::scalar_tensor", broadcasts=True)
def _scalar(low: Lowering, pair: NodePair, fill: float | Affine, *_: object) -> Value:
    return low.graph.number(fill, pair.dtype)


@rule("aten::arange.start_step", "aten::arange.start", "aten::arange")
def _arange(low: Lowering, pair: NodePair, *arguments: float | Affine | None) -> Value:
    name = pair.small.target.__name__  # type: ignore[union-attr]
    start: float | Affine | None = 0
    step: float | Affine | None = 1
    if name == "default":
        end = arguments[0]
    else:
        start, end = arguments[0], arguments[1]
        if name == "start_step":
            step = arguments[2]
    graph = low.graph
    if isinstance(start, Affine) or isinstance(step, Affine) or start is None or end is None or step is None:
        raise ModelError("a range that starts or steps by the batch size cannot be compiled")
    if not isinstance(end, Affine):
        return graph.constant(np.arange(start, end, step, dtype=pair.dtype))
    bounds = (graph.number(start, pair.dtype), graph.number(end, pair.dtype), graph.number(step, pair.dtype))
    return graph.op("Range", *bounds, shape=pair.shape)


def random_bits(low: Lowering, pair: NodePair) -> Value:
    """Independent numbers, uniform in [0, 2^32), int64, of the shape of the node's result."""
    graph = low.graph
    if low.seed is None:
        low.seed = graph.input(SEED, (), "int64")
    low.n_random += 1

    def xor_shift(value: Value, bits: int) -> Value:
        shifted = graph.pointwise("Div", value, graph.scalar(2**bits, "int64"))
        return graph.pointwise("BitwiseXor", value, shifted)

    def multiply(value: Value, factor: int) -> Value:
        product = graph.pointwise("Mul", value, graph.scalar(factor, "int64"))
        return graph.pointwise("BitwiseAnd", product, graph.scalar(_MASK, "int64"))

    def mix(value: Value) -> Value:
        value = multiply(xor_shift(value, 16), _MULTIPLIERS[0])
        value = multiply(xor_shift(value, 15), _MULTIPLIERS[1])
        return xor_shift(value, 16)

    stream = (low.n_random * 0x9E3779B9) & _MASK
    key = graph.pointwise("BitwiseAnd", low.seed, graph.scalar(_MASK, "int64"))
    key = mix(graph.pointwise("BitwiseXor", mix(key), graph.scalar(stream, "int64")))
    shape = pair.shape
    count = n_elements(shape)
    counter: Value
    if isinstance(count, Affine):
        bounds = (graph.scalar(0, "int64"), graph.number(count, "int64"), graph.scalar(1, "int64"))
        counter = graph.op("Range", *bounds, shape=(count,))
    else:
        bounds = (graph.scalar(0, "int64"), graph.scalar(count, "int64"), graph.scalar(1, "int64"))
        counter = graph.op("Range", *bounds, shape=(count,))
    # Two rounds, the key between them: streams with related keys are not shifted copies of each other.
    bits = mix(graph.pointwise("BitwiseXor", mix(counter), key))
    return graph.reshape(bits, shape)


@rule("aten::bernoulli.p", "aten::bernoulli")
def _bernoulli(low: Lowering, pair: NodePair, x: Value, probability: object = None, *_: object) -> Value:
    """1 with the given probability, else 0."""
    if not isinstance(probability, int | float):
        raise ModelError("random choice with a probability for each element cannot be compiled; use nn.Dropout")
    del x
    graph = low.graph
    chosen = graph.pointwise(
        "Less", random_bits(low, pair), graph.scalar(round(probability * 2**32), "int64"), dtype="bool"
    )
    return graph.cast(chosen, pair.dtype)


@rule("aten::rand", "aten::rand_like")
def _rand(low: Lowering, pair: NodePair, *_: object) -> Value:
    """Uniform in [0, 1), with 24 bits, so that the largest float is below one."""
    graph = low.graph
    bits = graph.pointwise("Div", random_bits(low, pair), graph.scalar(2**8, "int64"))
    return graph.pointwise("Mul", graph.cast(bits, pair.dtype), graph.scalar(2.0**-24, pair.dtype))
