"""What a compiled step costs: operations and peak memory, counted on the ONNX graph.

All counts are affine in the batch size, so two batch sizes tell them. Peak memory follows the order in which
onnxruntime runs the nodes, which is not the file's: a tensor lives from the node that makes it to the last that reads
it; inputs and outputs live throughout.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from reft_edge.bundle.manifest import Cost
from reft_edge.compile.work import count_work, product_of

if TYPE_CHECKING:
    import onnx

    from reft_edge.compile.graph import Built

_BATCHES = (8, 40)
"""Batch sizes at which a graph is measured."""

_SHARED = frozenset({"Reshape", "Identity"})
"""Operators whose output is their input's memory."""

_MOVES = _SHARED | {
    "Shape",
    "Transpose",
    "Slice",
    "Split",
    "Concat",
    "Pad",
    "Expand",
    "Gather",
    "Cast",
    "OneHot",
    "MaxUnpool",
    "Tile",
}
"""Operators that compute nothing."""

_ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bool": 1, "uint8": 1, "int8": 1}


def count_cost(training: Built, inference: Built, n_parameters: int) -> Cost:
    """The cost of one step and of one sample's forward pass."""
    few, many = _BATCHES
    peaks = [_peak_bytes(training, n_batch) for n_batch in _BATCHES]
    flops = [_flops(training, n_batch) for n_batch in _BATCHES]
    macs = [_macs(inference, n_batch) for n_batch in _BATCHES]
    per_sample = -(-(peaks[1] - peaks[0]) // (many - few))
    predicting = [_peak_bytes(inference, n_batch) for n_batch in _BATCHES]
    return Cost(
        parameters=n_parameters,
        forward_macs=(macs[1] - macs[0]) // (many - few),
        step_flops_per_sample=-(-flops[1] // many),
        memory_fixed_bytes=max(peaks[0] - few * per_sample, 0),
        memory_per_sample_bytes=per_sample,
        prediction_bytes_per_sample=-(-(predicting[1] - predicting[0]) // (many - few)),
        step_work=count_work(training),
        forward_work=count_work(inference),
    )


def _flops(built: Built, n_batch: int) -> int:
    """Floating-point operations: two for a multiply-accumulate, one for each element that another operator takes."""
    total = 0
    for node in built.model.graph.node:
        macs = _node_macs(built, node, n_batch)
        if macs:
            total += 2 * macs
        elif node.op_type not in _MOVES:
            names = [name for name in (*node.output, *node.input) if name]
            total += max(prod(built.shape(name, n_batch)) for name in names)
    return total


def _macs(built: Built, n_batch: int) -> int:
    return sum(_node_macs(built, node, n_batch) for node in built.model.graph.node)


def _node_macs(built: Built, node: onnx.NodeProto, n_batch: int) -> int:
    """Multiply-accumulates of one node; 0 for one that is no product."""
    product = product_of(built, node, n_batch)
    return 0 if product is None else product.macs


def execution_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes as onnxruntime runs them by default: depth first from those whose outputs no node reads, the last of
    them first, and of a node's inputs the latest first.

    A residual network holds 40% more at once in this order than in the file's.
    """
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    makers = [sorted({maker[name] for name in node.input if name in maker}) for node in graph.node]
    read = {index for indices in makers for index in indices}
    stack = [(index, False) for index in range(len(graph.node)) if index not in read]
    entered: set[int] = set()
    order: list[onnx.NodeProto] = []
    while stack:
        index, is_ready = stack.pop()
        if is_ready:
            order.append(graph.node[index])
        elif index not in entered:
            entered.add(index)
            stack.append((index, True))
            stack += [(before, False) for before in makers[index] if before not in entered]
    return order


def _peak_bytes(built: Built, n_batch: int) -> int:
    """Largest sum of live tensors."""
    graph = built.model.graph
    nodes = execution_order(graph)
    owner: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        if node.op_type in _SHARED:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
        for name in node.input:
            last[owner.get(name, name)] = index
    held = {value.name for value in (*graph.input, *graph.output)} | {tensor.name for tensor in graph.initializer}

    def n_bytes(name: str) -> int:
        return prod(built.shape(name, n_batch)) * _ITEMSIZE[built.values[name].dtype]

    live = peak = sum(n_bytes(name) for name in held)
    for index, node in enumerate(nodes):
        made = [name for name in node.output if name and name not in owner and name not in held]
        live += sum(n_bytes(name) for name in made)
        peak = max(peak, live)
        read = {owner.get(name, name) for name in (*node.input, *node.output) if name}
        live -= sum(n_bytes(name) for name in read if name not in held and last.get(name, index) == index)
    return peak
