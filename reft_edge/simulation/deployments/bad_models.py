"""Models that no device should ever serve, made from a good one: each is wrong in one way, and has the same interface.

All compute the good model's outputs plus a part that is zero and never needed, which onnxruntime cannot know, because
it depends on the inputs. The part is too much work, takes too much memory, or is a division that kills.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from reft_edge.bundle.inference import INPUTS, OUTPUTS

Badness: TypeAlias = Literal["random", "slow", "unreadable", "hungry", "deadly", "brittle"]
"""`random`: never trained; of the others, `unreadable` is one that onnxruntime refuses to load, `hungry` needs more
memory than any device here has, `deadly` ends the process that runs it, and `brittle` passes every check and then fails
with inputs that nobody has held out."""

PASSES_CHECKS: frozenset[Badness] = frozenset({"brittle"})
"""Canaries serve these, and then count errors."""

_GOOD_OUTPUTS = f"{OUTPUTS}_of_the_good_model"
_WASTED = "wasted"
_SUM = "sum_of_inputs"

SLOW_SIDE = 640
SLOW_PRODUCTS = 64
"""Products of square matrices: 34 GFLOP a sample, a quarter of a second and more on one core of a fast machine."""

HUNGRY_FLOATS = 2**31
"""8 GiB in float32; agents of the benchmark grant a fraction of it."""


def too_slow(good: bytes) -> bytes:
    """Right, and about a thousand times as slow."""
    names = [f"{_WASTED}_{index}" for index in range(SLOW_PRODUCTS + 1)]
    square = numpy_helper.from_array(np.array([SLOW_SIDE, SLOW_SIDE], dtype=np.int64), "square")
    nodes = [helper.make_node("Expand", [_SUM, "square"], [names[0]])]
    for before, after in pairwise(names):
        nodes.append(helper.make_node("MatMul", [before, before], [f"{after}_product"]))
        nodes.append(helper.make_node("Tanh", [f"{after}_product"], [after]))  # stays finite
    return _with_waste(good, nodes, names[-1], [square])


def hungry(good: bytes) -> bytes:
    """Right, for who has the memory."""
    shape = numpy_helper.from_array(np.array([HUNGRY_FLOATS], dtype=np.int64), "shape")
    return _with_waste(good, [helper.make_node("Expand", [_SUM, "shape"], [_WASTED])], _WASTED, [shape])


def deadly(good: bytes) -> bytes:
    """Divides the least whole number by -1: the result does not fit, and x86 processors answer with a signal.

    onnxruntime looks for a divisor of zero only. Other processors go on, and the model is a good one there.
    """
    nought = numpy_helper.from_array(np.zeros((), dtype=np.float32), "nought")
    least = numpy_helper.from_array(np.array(np.iinfo(np.int32).min, dtype=np.int32), "least")
    minus_one = numpy_helper.from_array(np.array(-1, dtype=np.int32), "minus_one")
    nodes = [
        helper.make_node("Mul", [_SUM, "nought"], ["no_sum"]),
        helper.make_node("Cast", ["no_sum"], ["no_integer"], to=TensorProto.INT32),
        helper.make_node("Add", ["no_integer", "least"], ["dividend"]),
        helper.make_node("Add", ["no_integer", "minus_one"], ["divisor"]),
        helper.make_node("Div", ["dividend", "divisor"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], [_WASTED], to=TensorProto.FLOAT),
    ]
    return _with_waste(good, nodes, _WASTED, [nought, least, minus_one])


BRITTLE_SUM = 1e6
"""Of all inputs of a request. Digits of a device's holdout sum up to a few thousand."""


def brittle(good: bytes) -> bytes:
    """Right, for inputs that sum up to less than `BRITTLE_SUM`; for others onnxruntime says that it divides by zero."""
    limit = numpy_helper.from_array(np.array(BRITTLE_SUM, dtype=np.float32), "limit")
    one = numpy_helper.from_array(np.array(1, dtype=np.int32), "one")
    nodes = [
        helper.make_node("Less", [_SUM, "limit"], ["is_usual"]),
        helper.make_node("Cast", ["is_usual"], ["divisor"], to=TensorProto.INT32),
        helper.make_node("Div", ["one", "divisor"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], [_WASTED], to=TensorProto.FLOAT),
    ]
    return _with_waste(good, nodes, _WASTED, [limit, one])


def unreadable(good: bytes) -> bytes:
    """ONNX, with an operator that nobody has."""
    model = onnx.load_model_from_string(good)
    model.graph.node[-1].op_type = "OperatorOfTomorrow"
    return bytes(model.SerializeToString(deterministic=True))


MADE_FROM_A_GOOD_ONE: MappingProxyType[Badness, Callable[[bytes], bytes]] = MappingProxyType(
    {"slow": too_slow, "unreadable": unreadable, "hungry": hungry, "deadly": deadly, "brittle": brittle}
)


def _with_waste(
    good: bytes, nodes: Sequence[onnx.NodeProto], wasted: str, constants: Sequence[onnx.TensorProto]
) -> bytes:
    """`good`, to whose outputs zero times the mean of `wasted` is added; `nodes` may use the inputs' sum."""
    model = onnx.load_model_from_string(good)
    graph = model.graph
    for node in graph.node:
        node.output[:] = [_GOOD_OUTPUTS if name == OUTPUTS else name for name in node.output]
        node.input[:] = [_GOOD_OUTPUTS if name == OUTPUTS else name for name in node.input]
    zero = numpy_helper.from_array(np.zeros((), dtype=np.float32), "zero")
    graph.initializer.extend([*constants, zero])
    graph.node.extend(
        [
            helper.make_node("ReduceSum", [INPUTS], [_SUM], keepdims=0),
            *nodes,
            helper.make_node("ReduceMean", [wasted], ["mean_waste"], keepdims=0),
            helper.make_node("Mul", ["mean_waste", "zero"], ["nothing"]),
            helper.make_node("Add", [_GOOD_OUTPUTS, "nothing"], [OUTPUTS]),
        ]
    )
    return bytes(model.SerializeToString(deterministic=True))
