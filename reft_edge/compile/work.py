"""What the nodes of a graph make a processor do, counted so that a device's measured rates turn it into time.

Multiply-accumulates alone say little: one core runs the training steps of one network at 70 GFLOP/s and of its smallest
variant at 3. Products over few columns fill their registers with padding, gathering the columns of a convolution costs
as much as a product with few rows, passes over memory compute next to nothing, and each node costs its call. So three
things are counted (a roofline with a third side; Williams, Waterman, Patterson, CACM 52 (4), 2009):

- operations of matrix products, as the kernels do them, padding included;
- bytes that are moved, as many as a plain pass over memory would move in the same time;
- calls: of nodes, and for binding each tensor that goes in or comes out.

What makes one operator slower than a plain pass is a property of onnxruntime's kernels, and so are the weights below:
measured node by node over 17 variants of 7 models (onnxruntime 1.31, x86-64, one thread). How fast a device does each
of the three is measured there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from reft_edge.bundle.manifest import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from reft_edge.compile.graph import Built

_BATCHES = (16, 48)
"""Batch sizes at which work is counted: multiples of the columns below, so that padding does not bend the line."""

_COLUMNS = 16
"""Columns of a product that the kernels compute together; fewer cost as much. (MLAS, float32, 512-bit registers: 16 to
48; four to eight times fewer on a small board, whose rates for the reference step then contain the difference.)"""

_GATHERED = 6
"""Bytes moved for each element that a product takes or gives: 4 of its own, packing, and the columns of a convolution
that are written first. 0.15 ns against 0.025 ns a byte in a plain pass."""

_GATHERED_IN_SPACE = 4
"""Times that, for columns of convolutions over more than two axes, which are gathered one element at a time."""

_PRODUCT_BYTES = 5000
"""What each single product costs besides, in bytes: 0.2 us. A convolution is one for each sample and group."""

_SAMPLE_BYTES = 10_000
"""What setting up all groups of one sample costs besides."""

_SLOWER = {
    "ReduceSumSquare": 6.0,
    "LogSoftmax": 16.0,
    "Softmax": 16.0,
    "Erf": 4.0,
    "Exp": 3.0,
    "Log": 3.0,
    "Tanh": 3.0,
    "Sigmoid": 3.0,
    "Pow": 6.0,
    "OneHot": 16.0,
    "Sqrt": 2.0,
    "Div": 2.0,
    "Transpose": 2.0,
    "Pad": 2.5,
    "Slice": 1.5,
    "Gather": 2.0,
    "ScatterElements": 8.0,
    "AveragePool": 4.0,
    "MaxPool": 4.0,
}
"""Times that an operator takes longer than a plain pass over its inputs and outputs."""

_INDEXED_POOL = 20.0
"""The same for a MaxPool that also gives the indices: no vectorized kernel has them."""

_VIEWS = frozenset({"Reshape", "Identity", "Shape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that move nothing."""

_ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bool": 1, "uint8": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Product:
    """`count` matrix products of (rows, inner) by (inner, columns)."""

    rows: int
    inner: int
    columns: int
    count: int
    groups: int = 1
    """Of the products, so many are set up together."""
    in_space: bool = False
    """Whether the columns are gathered from more than two axes."""

    @property
    def macs(self) -> int:
        return self.rows * self.inner * self.columns * self.count

    @property
    def padded_flops(self) -> int:
        return 2 * self.rows * self.inner * self._padded_columns * self.count

    @property
    def moved_bytes(self) -> int:
        gathered = self.inner * self._padded_columns * (_GATHERED_IN_SPACE if self.in_space else 1)
        elements = self.rows * self.inner + gathered + self.rows * self.columns
        setting_up = _PRODUCT_BYTES * self.count + _SAMPLE_BYTES * (self.count // self.groups)
        return _GATHERED * self.count * elements + setting_up

    @property
    def _padded_columns(self) -> int:
        return -(-self.columns // _COLUMNS) * _COLUMNS


def count_work(built: Built) -> Work:
    """The work of one run of a graph, affine in the batch size."""
    graph, (few, many) = built.model.graph, _BATCHES
    flops = [sum(product.padded_flops for product in _products(built, n_batch)) for n_batch in _BATCHES]
    moved = [_moved_bytes(built, n_batch) for n_batch in _BATCHES]
    flops_each, moved_each = ((pair[1] - pair[0]) // (many - few) for pair in (flops, moved))
    return Work(
        product_flops_fixed=max(flops[0] - few * flops_each, 0),
        product_flops_per_sample=max(flops_each, 0),
        moved_bytes_fixed=max(moved[0] - few * moved_each, 0),
        moved_bytes_per_sample=max(moved_each, 0),
        calls=len(graph.node) + len(graph.input) + len(graph.output),
    )


def product_of(built: Built, node: onnx.NodeProto, n_batch: int) -> Product | None:
    """The matrix products that a node comes down to; None for one that is no product."""
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return None
    left, right, result = (built.shape(name, n_batch) for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Conv":
        groups = left[1] // right[1]
        return Product(
            rows=right[0] // groups,
            inner=prod(right[1:]),
            columns=prod(result[2:]),
            count=result[0] * groups,
            groups=groups,
            in_space=len(right) > 4,
        )
    if node.op_type == "ConvTranspose":
        groups = result[1] // right[1]
        return Product(
            rows=prod(right[1:]),
            inner=right[0] // groups,
            columns=prod(left[2:]),
            count=left[0] * groups,
            groups=groups,
            in_space=len(right) > 4,
        )
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return Product(rows=result[0], inner=left[0 if transposed else 1], columns=result[1], count=1)
    return _matrix_product(left, right, result)


def _matrix_product(left: Sequence[int], right: Sequence[int], result: Sequence[int]) -> Product:
    """MatMul, numpy's rule: a right operand of two axes makes one tall product, else there is one for each matrix."""
    rows = result[-2] if len(result) > 1 and len(left) > 1 else 1
    columns = result[-1] if len(right) > 1 else 1
    count = prod(result) // (rows * columns)
    if len(right) <= 2:
        rows, count = rows * count, 1
    return Product(rows=rows, inner=left[-1], columns=columns, count=count)


def _products(built: Built, n_batch: int) -> list[Product]:
    found = (product_of(built, node, n_batch) for node in built.model.graph.node)
    return [product for product in found if product is not None]


def _moved_bytes(built: Built, n_batch: int) -> int:
    total = 0.0
    for node in built.model.graph.node:
        product = product_of(built, node, n_batch)
        if product is not None:
            total += product.moved_bytes
        elif node.op_type not in _VIEWS:
            names = [name for name in (*node.input, *node.output) if name]
            n_bytes = sum(prod(built.shape(name, n_batch)) * _ITEMSIZE[built.values[name].dtype] for name in names)
            total += n_bytes * _slowness(node)
    return int(total)


def _slowness(node: onnx.NodeProto) -> float:
    if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
        return _INDEXED_POOL
    return _SLOWER.get(node.op_type, 1.0)
