"""Build an ONNX graph: values with shapes, one node at a time.

A thin layer over onnx's protobufs that gives every intermediate a short unique name, shares equal constants and equal
nodes, and drops what no output needs. It knows no torch. Names and order depend only on the calls, so equal calls give
equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reft_edge.compile.symbols import Affine, Dim, Shape, at_batch, broadcast
from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from reft_edge.types import Array

OPSET = 18
"""Understood by onnxruntime 1.15 and later; 18 brought bitwise operators, which dropout's random numbers use."""

IR_VERSION = 9

BATCH_AXIS = "n_batch"
"""Name of the free axis in the graph's inputs."""

Attribute: TypeAlias = int | float | str | Sequence[int]


@dataclass(frozen=True)
class Value:
    """A tensor in the graph: its name, shape and numpy dtype name.

    The shape may be smaller than what torch has at that place, where numpy's broadcasting makes them equal: expanded
    tensors are not written out until an operator needs them so.
    """

    name: str
    shape: Shape
    dtype: str

    @property
    def rank(self) -> int:
        return len(self.shape)


_ONNX_DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
    "int64": onnx.TensorProto.INT64,
    "int32": onnx.TensorProto.INT32,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "bool": onnx.TensorProto.BOOL,
}


def onnx_dtype(dtype: str) -> int:
    """ONNX's number for a numpy dtype name. Raises `ModelError` for one that graphs do not carry."""
    if dtype not in _ONNX_DTYPES:
        raise ModelError(f"dtype {dtype} cannot be compiled; use one of {', '.join(_ONNX_DTYPES)}")
    return int(_ONNX_DTYPES[dtype])


@dataclass(frozen=True)
class Built:
    """A finished graph, and what is known about its values by their names."""

    model: onnx.ModelProto
    values: dict[str, Value]

    def shape(self, name: str, n_batch: int) -> tuple[int, ...]:
        """A value's shape at a batch size."""
        return at_batch(self.values[name].shape, n_batch)


@dataclass
class GraphBuilder:
    """Collects nodes; `model` makes the ONNX file."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    _constant_names: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    _known: dict[object, tuple[Value, ...]] = field(default_factory=dict)
    _producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    _values: dict[str, Value] = field(default_factory=dict)
    _counter: int = 0

    def input(self, name: str, shape: Shape, dtype: str) -> Value:
        """A graph input."""
        onnx_dtype(dtype)
        value = Value(name, shape, dtype)
        self.inputs.append(value)
        self._values[name] = value
        return value

    def constant(self, array: Array) -> Value:
        """A constant; equal ones are stored once."""
        array = np.asarray(array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constant_names:
            self._constant_names[key] = f"c{len(self._constant_names)}"
            name = self._constant_names[key]
            self.constants[name] = array
            self._values[name] = Value(name, array.shape, array.dtype.name)
        return self._values[self._constant_names[key]]

    def scalar(self, value: float, dtype: str) -> Value:
        return self.constant(np.array(value, dtype=dtype))

    def ints(self, values: Sequence[int]) -> Value:
        return self.constant(np.array(values, dtype=np.int64))

    def node(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[tuple[Shape, str]],
        **attributes: Attribute,
    ) -> tuple[Value, ...]:
        """Add a node with any number of outputs, given as (shape, dtype); an equal earlier node is re-used."""
        names = [value.name if value is not None else "" for value in inputs]
        key = (op_type, tuple(names), len(outputs), tuple(sorted((k, _hashable(v)) for k, v in attributes.items())))
        if key not in self._known:
            results = []
            for shape, dtype in outputs:
                self._counter += 1
                results.append(Value(f"v{self._counter}", shape, dtype))
            made = [value.name for value in results]
            node = helper.make_node(op_type, names, made, **attributes)  # type: ignore[arg-type]
            self.nodes.append(node)
            self._known[key] = tuple(results)
            self._producers.update({value.name: node for value in results})
            self._values.update({value.name: value for value in results})
        return self._known[key]

    def op(
        self, op_type: str, *inputs: Value | None, shape: Shape, dtype: str | None = None, **attributes: Attribute
    ) -> Value:
        """Add a node with one output, by default of the first input's dtype."""
        if dtype is None:
            dtype = next(value.dtype for value in inputs if value is not None)
        return self.node(op_type, inputs, [(shape, dtype)], **attributes)[0]

    def pointwise(self, op_type: str, *inputs: Value, dtype: str | None = None, **attributes: Attribute) -> Value:
        """Add an elementwise node; its shape is its operands' broadcast together."""
        shape = broadcast(*(value.shape for value in inputs))
        return self.op(op_type, *inputs, shape=shape, dtype=dtype or inputs[0].dtype, **attributes)

    def producer(self, value: Value) -> onnx.NodeProto | None:
        """The node that makes a value; None for inputs and constants."""
        return self._producers.get(value.name)

    def operand(self, node: onnx.NodeProto, index: int) -> Value:
        """What a node of this graph reads."""
        return self._values[node.input[index]]

    # What depends on the batch size.

    def batch(self) -> Value:
        """The batch size as int64 (1,), read from the samples' input."""
        samples = next(value for value in self.inputs if value.shape and isinstance(value.shape[0], Affine))
        return self.op("Shape", samples, shape=(1,), dtype="int64", start=0, end=1)

    def dim(self, dim: Dim) -> Value:
        """A size as int64 (1,)."""
        if not isinstance(dim, Affine):
            return self.ints([dim])
        value = self.batch()
        if dim.slope != 1:
            value = self.pointwise("Mul", value, self.ints([dim.slope]))
        if dim.offset:
            value = self.pointwise("Add", value, self.ints([dim.offset]))
        return value

    def sizes(self, shape: Shape) -> Value:
        """A shape as an int64 vector."""
        if not any(isinstance(dim, Affine) for dim in shape):
            return self.ints([dim for dim in shape if not isinstance(dim, Affine)])
        return self.op("Concat", *(self.dim(dim) for dim in shape), shape=(len(shape),), dtype="int64", axis=0)

    def number(self, number: float | Affine, dtype: str) -> Value:
        """A scalar that may depend on the batch size."""
        if not isinstance(number, Affine):
            return self.scalar(number, dtype)
        scalar = self.op("Reshape", self.dim(number), self.ints([]), shape=(), dtype="int64")
        return scalar if dtype == "int64" else self.op("Cast", scalar, shape=(), dtype=dtype, to=onnx_dtype(dtype))

    # Shape changes that many rules need.

    def reshape(self, value: Value, shape: Shape) -> Value:
        """`value`, all of it, in another shape; at most one axis may depend on the batch size."""
        if value.shape == shape:
            return value
        symbolic = sum(isinstance(dim, Affine) for dim in shape)
        if symbolic <= 1:
            target = self.ints([-1 if isinstance(dim, Affine) else dim for dim in shape])
        else:
            target = self.sizes(shape)
        return self.op("Reshape", value, target, shape=shape)

    def transpose(self, value: Value, perm: Sequence[int]) -> Value:
        """Axis `i` of the result is axis `perm[i]`; one transposition after another becomes one."""
        producer = self.producer(value)
        if producer is not None and producer.op_type == "Transpose":
            first = list(next(attribute.ints for attribute in producer.attribute if attribute.name == "perm"))
            value, perm = self.operand(producer, 0), [first[axis] for axis in perm]
        if list(perm) == list(range(len(perm))):
            return value
        return self.op("Transpose", value, shape=tuple(value.shape[axis] for axis in perm), perm=list(perm))

    def expand(self, value: Value, shape: Shape) -> Value:
        """Write a broadcast out, so that the tensor really has `shape`."""
        if value.shape == shape:
            return value
        return self.op("Expand", value, self.sizes(shape), shape=shape)

    def cast(self, value: Value, dtype: str) -> Value:
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, shape=value.shape, dtype=dtype, to=onnx_dtype(dtype))

    def reduce(self, op_type: str, value: Value, axes: Sequence[int], *, keepdims: bool) -> Value:
        """ReduceSum, ReduceMean and so on over `axes`, which are not negative."""
        shape: list[Dim] = []
        for axis, dim in enumerate(value.shape):
            if axis not in axes:
                shape.append(dim)
            elif keepdims:
                shape.append(1)
        return self.op(op_type, value, self.ints(sorted(axes)), shape=tuple(shape), keepdims=int(keepdims))

    def channel_sum(self, value: Value, *, squared: bool = False) -> Value:
        """Sum, or sum of squares, over all axes but the second: (channels,).

        In two steps, positions first and then the batch: onnxruntime sums long rows in order, and the short rows of two
        steps keep a digit more.
        """
        first = "ReduceSumSquare" if squared else "ReduceSum"
        if value.rank == 2:
            return self.reduce(first, value, [0], keepdims=False)
        rows = self.reduce(first, value, range(2, value.rank), keepdims=False)
        if rows.shape[0] == 1:
            return self.reshape(rows, rows.shape[1:])
        return self.reduce("ReduceSum", rows, [0], keepdims=False)

    def channel_mean(self, value: Value, *, squared: bool = False) -> Value:
        """Mean, or mean of squares, over all axes but the second: (channels,)."""
        if value.rank == 2:
            if squared:
                value = self.pointwise("Mul", value, value)
            return self.reduce("ReduceMean", value, [0], keepdims=False)
        axes = range(2, value.rank)
        if not squared:
            return self.reduce(
                "ReduceMean", self.reduce("ReduceMean", value, axes, keepdims=False), [0], keepdims=False
            )
        rows = self.reduce("ReduceSumSquare", value, axes, keepdims=False)
        share = self.scalar(1 / prod(dim for dim in value.shape[2:] if not isinstance(dim, Affine)), value.dtype)
        return self.pointwise("Mul", self.reduce("ReduceMean", rows, [0], keepdims=False), share)

    def slice(
        self, value: Value, axes: Sequence[int], starts: Sequence[int], sizes: Shape, steps: Sequence[int]
    ) -> Value:
        """`sizes[i]` entries along `axes[i]`, from `starts[i]` in steps of `steps[i]` (positive)."""
        ends: list[Dim] = []
        for start, size, step in zip(starts, sizes, steps, strict=True):
            if isinstance(size, Affine):
                ends.append(Affine(size.slope * step, start + (size.offset - 1) * step + 1))
            else:
                ends.append(start + (size - 1) * step + 1)
        shape = list(value.shape)
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = size
        if tuple(shape) == value.shape:
            return value
        operands = (self.ints(starts), self.sizes(tuple(ends)), self.ints(axes), self.ints(steps))
        return self.op("Slice", value, *operands, shape=tuple(shape))

    def finish(self, outputs: dict[str, Value]) -> Built:
        """The graph with the named outputs, without the nodes and constants that none of them needs."""
        tail = [helper.make_node("Identity", [value.name], [name]) for name, value in outputs.items()]
        needed = {name for node in tail for name in node.input}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        kept.reverse()
        infos = [_info(value.name, value) for value in self.inputs]
        results = [_info(name, value) for name, value in outputs.items()]
        nodes = _rename_outputs(kept, {value.name: name for name, value in outputs.items()}, tail)
        initializers = [
            numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            for name, array in self.constants.items()
            if name in needed
        ]
        graph = helper.make_graph(nodes, "reft", infos, results, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        return Built(model, {**self._values, **outputs})


def _rename_outputs(
    nodes: list[onnx.NodeProto], names: dict[str, str], tail: list[onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """Give values that leave the graph their outside names, so that no copy is made at the end."""
    made = {output for node in nodes for output in node.output}
    final = {inner: outer for inner, outer in names.items() if inner in made}
    for node in nodes:
        for fields in (node.input, node.output):
            for index, name in enumerate(fields):
                fields[index] = final.get(name, name)
    return nodes + [node for node in tail if final.get(node.input[0]) != node.output[0]]


def _info(name: str, value: Value) -> onnx.ValueInfoProto:
    dims: list[int | str] = []
    for dim in value.shape:
        if not isinstance(dim, Affine):
            dims.append(dim)
        elif dim == Affine(1):
            dims.append(BATCH_AXIS)
        else:
            dims.append(f"{dim.slope}*{BATCH_AXIS}+{dim.offset}")
    return helper.make_tensor_value_info(name, onnx_dtype(value.dtype), dims)


def _hashable(attribute: Attribute) -> object:
    return tuple(attribute) if isinstance(attribute, list | tuple) else attribute
