"""What a compiled step costs: operations and peak memory, counted on the ONNX graph.

Shapes come from ONNX shape inference at two batch sizes; all counts are affine in the batch size. Peak memory
follows the order in which onnxruntime runs the nodes: a tensor lives from the node that makes it to the last that reads it,
inputs and outputs live throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import onnx
from onnx import helper

from reft_edge.bundle.manifest import Cost
from reft_edge.compile.graph import BATCH_AXIS

_BATCHES = (8, 40)
"""Batch sizes at which a graph is measured."""

_FREE = frozenset({"Reshape", "Identity", "Shape", "Squeeze", "Unsqueeze"})
"""Operators that move nothing: onnxruntime lets their output share the input's memory."""

_MOVES = frozenset(
    {"Transpose", "Slice", "Concat", "Pad", "Expand", "Gather", "Cast", "OneHot", "MaxUnpool", "Tile", "Split"}
)
"""Operators that move data and compute nothing."""

_IN_PLACE = frozenset(["Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Exp", "Sqrt", "Neg", "Abs", "Erf", "Log", "Reciprocal", "Clip", "Sign"])
"""Operators that onnxruntime lets overwrite an input that nobody reads later."""


def count_cost(training: onnx.ModelProto, inference: onnx.ModelProto, n_parameters: int) -> Cost:
    """The cost of one step and of one sample's forward pass."""
    small, large = (_Measured(training, n_batch) for n_batch in _BATCHES)
    span = _BATCHES[1] - _BATCHES[0]
    per_sample = -(-(large.peak_bytes - small.peak_bytes) // span)
    forward = [_Measured(inference, n_batch).macs for n_batch in _BATCHES]
    return Cost(
        parameters=n_parameters,
        forward_macs=(forward[1] - forward[0]) // span,
        step_flops_per_sample=(large.flops - small.flops) // span + small.fixed_flops // _BATCHES[1],
        memory_fixed_bytes=max(small.peak_bytes - _BATCHES[0] * per_sample, 0),
        memory_per_sample_bytes=per_sample,
    )


class _Measured:
    """Shapes, operations and live memory of a graph at one batch size."""

    def __init__(self, model: onnx.ModelProto, n_batch: int) -> None:
        self.graph = _with_batch(model, n_batch).graph
        infos = (*self.graph.input, *self.graph.value_info, *self.graph.output)
        self.types = {info.name: info.type.tensor_type for info in infos}
        self.constants = {tensor.name: tuple(tensor.dims) for tensor in self.graph.initializer}
        self.macs = sum(self._macs(node) for node in self.graph.node)
        self.flops = 2 * self.macs + sum(self._elements(node) for node in self.graph.node)
        self.fixed_flops = 0
        self.peak_bytes = self._peak()

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.constants:
            return self.constants[name]
        return tuple(dim.dim_value for dim in self.types[name].shape.dim) if name in self.types else ()

    def n_bytes(self, name: str) -> int:
        itemsize = {
            onnx.TensorProto.INT64: 8,
            onnx.TensorProto.DOUBLE: 8,
            onnx.TensorProto.BOOL: 1,
            onnx.TensorProto.UINT8: 1,
        }
        kind = self.types[name].elem_type if name in self.types else onnx.TensorProto.FLOAT
        return prod(self.shape(name)) * itemsize.get(kind, 4)

    def _macs(self, node: onnx.NodeProto) -> int:
        if node.op_type == "Conv":
            return prod(self.shape(node.output[0])) * prod(self.shape(node.input[1])[1:])
        if node.op_type == "ConvTranspose":
            return prod(self.shape(node.input[0])) * prod(self.shape(node.input[1])[1:])
        if node.op_type == "MatMul":
            return prod(self.shape(node.output[0])) * self.shape(node.input[0])[-1]
        if node.op_type == "Gemm":
            inner = self.shape(node.input[0])[0 if _flag(node, "transA") else 1]
            return prod(self.shape(node.output[0])) * inner
        return 0

    def _elements(self, node: onnx.NodeProto) -> int:
        if node.op_type in _FREE or node.op_type in _MOVES or self._macs(node):
            return 0
        return max(prod(self.shape(name)) for name in (*node.output, *node.input) if name)

    def _peak(self) -> int:
        """Largest sum of live tensors, in the file's order of nodes."""
        owner: dict[str, str] = {}
        last: dict[str, int] = {}
        results = {value.name for value in self.graph.output}

        def own(name: str) -> str:
            return owner.get(name, name)

        for index, node in enumerate(self.graph.node):
            for name in node.input:
                last[own(name)] = index
            if node.op_type in _FREE and node.op_type != "Shape":
                owner[node.output[0]] = own(node.input[0])
        forever = {value.name for value in self.graph.input} | results | set(self.constants)
        live = sum(self.n_bytes(name) for name in forever if name not in owner)
        peak = live
        dying: dict[int, list[str]] = {}
        for name, index in last.items():
            dying.setdefault(index, []).append(name)
        for index, node in enumerate(self.graph.node):
            made = [name for name in node.output if name and own(name) == name and name not in forever]
            live += sum(self.n_bytes(name) for name in made)
            peak = max(peak, live)
            gone = {name for name in dying.get(index, ()) if name not in forever}
            gone |= {name for name in made if name not in last}
            live -= sum(self.n_bytes(name) for name in gone)
        return peak


def _flag(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _with_batch(model: onnx.ModelProto, n_batch: int) -> onnx.ModelProto:
    """A copy with the batch size put in and all shapes inferred."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == BATCH_AXIS:
                dim.dim_value = n_batch
    return onnx.shape_inference.infer_shapes(fixed, data_prop=True)


def _inputs(model: onnx.ModelProto) -> Mapping[str, int]:
    return {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
        for value in model.graph.input
    }
