"""Operators that move entries without computing: views, transpositions, slices, joins and their derivatives."""

from __future__ import annotations

from collections.abc import Sequence

from reft_edge.compile.graph import GraphBuilder, Value
from reft_edge.compile.layout import BatchLast, batch_first, batch_last, behind
from reft_edge.compile.lowering import Lowering, NodePair, Tensor, rule
from reft_edge.compile.symbols import Affine, Dim, Shape
from reft_edge.errors import ModelError


@rule(
    "aten::detach",
    "aten::alias",
    "aten::clone",
    "aten::contiguous",
    "aten::lift_fresh_copy",
    "aten::lift_fresh",
    "aten::view_of",
    broadcasts=True,
)
def _same(_: Lowering, __: NodePair, x: Value, *___: object) -> Value:
    return x


@rule("aten::expand", broadcasts=True)
def _expand(low: Lowering, pair: NodePair, x: Value, *_: object) -> Value:
    # Left small: whoever needs the full tensor writes it out. An expanded axis in front is dropped by broadcasting.
    del low, pair
    return x


@rule("aten::copy", broadcasts=True)
def _copy(low: Lowering, pair: NodePair, _: Value, source: Value, *__: object) -> Value:
    return low.graph.cast(source, pair.dtype)


@rule(
    "aten::view",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::view_copy",
    "aten::squeeze.dim",
    "aten::squeeze.dims",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::_reshape_alias",
    any_layout=True,
)
def _view(low: Lowering, pair: NodePair, x: Tensor, *_: object) -> Tensor:
    shape = pair.shape
    if isinstance(x, BatchLast):
        if shape[:1] == x.shape[:1]:  # what is viewed in another way lies before the batch
            return BatchLast(low.graph.reshape(x.stored, behind(shape)))
        x = batch_first(low.graph, x)
    return low.graph.reshape(x, shape)


@rule("aten::permute")
def _permute(low: Lowering, _: NodePair, x: Value, dims: Sequence[int]) -> Value:
    return low.graph.transpose(x, [dim % x.rank for dim in dims])


@rule("aten::transpose.int")
def _transpose(low: Lowering, _: NodePair, x: Value, first: int, second: int) -> Value:
    perm = list(range(x.rank))
    if perm:
        perm[first], perm[second] = perm[second], perm[first]
    return low.graph.transpose(x, perm)


@rule("aten::t")
def _t(low: Lowering, _: NodePair, x: Value) -> Value:
    return low.graph.transpose(x, range(x.rank)[::-1])


@rule("aten::cat", any_layout=True)
def _cat(low: Lowering, pair: NodePair, tensors: Sequence[Tensor], dim: int) -> Tensor:
    shape, graph = pair.shape, low.graph
    axis = dim % len(shape)
    tensors = [t for t in tensors if t.shape != (0,)]
    if axis > 0 and any(isinstance(t, BatchLast) for t in tensors):
        stored = [graph.cast(batch_last(graph, t), pair.dtype) for t in tensors]
        return BatchLast(graph.op("Concat", *stored, shape=behind(shape), axis=axis - 1))
    parts = [graph.cast(batch_first(graph, t) if isinstance(t, BatchLast) else t, pair.dtype) for t in tensors]
    return graph.op("Concat", *parts, shape=shape, axis=axis)


@rule("aten::stack")
def _stack(low: Lowering, pair: NodePair, tensors: Sequence[Value], dim: int) -> Value:
    shape = pair.shape
    axis = dim % len(shape)
    parts = [low.graph.reshape(t, (*t.shape[:axis], 1, *t.shape[axis:])) for t in tensors]
    return low.graph.op("Concat", *parts, shape=shape, axis=axis)


def _start(start: Dim | None, size: Dim) -> int:
    """A slice's start, counted from the front."""
    if isinstance(start, Affine) or (start is not None and start < 0 and isinstance(size, Affine)):
        raise ModelError("a slice that starts at a place that depends on the batch size cannot be compiled")
    if start is None or not isinstance(start, int):
        return 0
    return min(
        start if start >= 0 or isinstance(size, Affine) else max(start + size, 0),
        size if isinstance(size, int) else start,
    )


@rule("aten::slice.Tensor")
def _slice(
    low: Lowering,
    pair: NodePair,
    x: Value,
    dim: int = 0,
    start: Dim | None = None,
    end: Dim | None = None,
    step: int = 1,
) -> Value:
    del end
    axis = dim % x.rank
    return low.graph.slice(x, [axis], [_start(start, x.shape[axis])], (pair.shape[axis],), [step])


@rule("aten::select.int")
def _select(low: Lowering, pair: NodePair, x: Value, dim: int, index: Dim) -> Value:
    axis = dim % x.rank
    size = x.shape[axis]
    if isinstance(index, Affine) or (index < 0 and isinstance(size, Affine)):
        raise ModelError("selecting by the batch size cannot be compiled")
    start = index if index >= 0 or isinstance(size, Affine) else index + size
    return low.graph.reshape(low.graph.slice(x, [axis], [start], (1,), [1]), pair.shape)


def pad_zero(graph: GraphBuilder, x: Value, before: Sequence[Dim], after: Sequence[Dim], fill: float = 0) -> Value:
    """Pad every axis by so many entries in front and behind; negative counts cut."""
    if not any(dim != 0 for dim in (*before, *after)):
        return x
    shape = tuple(_add(size, low, high) for size, low, high in zip(x.shape, before, after, strict=True))
    pads = graph.sizes((*before, *after))
    return graph.op("Pad", x, pads, graph.scalar(fill, x.dtype), shape=shape, mode="constant")


def _add(*dims: Dim) -> Dim:
    slope = sum(dim.slope for dim in dims if isinstance(dim, Affine))
    offset = sum(dim.offset if isinstance(dim, Affine) else dim for dim in dims)
    return Affine(slope, offset) if slope else offset


def _minus(dim: Dim) -> Dim:
    return dim * -1


def _dilate(graph: GraphBuilder, x: Value, axis: int, step: int) -> Value:
    """Put `step - 1` zeros behind each entry along an axis."""
    split = (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :])
    after = [0] * len(split)
    after[axis + 1] = step - 1
    padded = pad_zero(graph, graph.reshape(x, split), [0] * len(split), after)
    return graph.reshape(padded, (*x.shape[:axis], x.shape[axis] * step, *x.shape[axis + 1 :]))


@rule("aten::slice_backward")
def _slice_backward(
    low: Lowering, _: NodePair, grad: Value, sizes: Sequence[Dim], dim: int, start: Dim, end: Dim, step: int
) -> Value:
    del end
    axis = dim % len(sizes)
    if step != 1:
        grad = _dilate(low.graph, grad, axis, step)
    before: list[Dim] = [0] * len(sizes)
    after: list[Dim] = [0] * len(sizes)
    before[axis] = _start(start, sizes[axis])
    after[axis] = _add(sizes[axis], _minus(grad.shape[axis]), _minus(before[axis]))
    return pad_zero(low.graph, grad, before, after)


@rule("aten::select_backward")
def _select_backward(low: Lowering, pair: NodePair, grad: Value, sizes: Sequence[Dim], dim: int, index: int) -> Value:
    axis = dim % len(sizes)
    size = sizes[axis]
    if isinstance(size, Affine) and index < 0:
        raise ModelError("selecting from the end of the batch cannot be compiled")
    start = index if index >= 0 or isinstance(size, Affine) else index + size
    row = low.graph.reshape(grad, (*pair.shape[:axis], 1, *pair.shape[axis + 1 :]))
    before: list[Dim] = [0] * len(sizes)
    after: list[Dim] = [0] * len(sizes)
    before[axis], after[axis] = start, _add(size, -1 - start)
    return pad_zero(low.graph, row, before, after)


def _pieces(low: Lowering, x: Value, axis: int, sizes: Sequence[Dim]) -> tuple[Value, ...]:
    """Cut an axis into pieces of the given sizes."""
    if any(isinstance(size, Affine) for size in sizes):
        raise ModelError("splitting the batch axis cannot be compiled")
    pieces: list[Value] = []
    start = 0
    for size in sizes:
        assert_size = int(size)  # type: ignore[arg-type]
        pieces.append(low.graph.slice(x, [axis], [start], (assert_size,), [1]))
        start += assert_size
    return tuple(pieces)


@rule("aten::split_with_sizes", "aten::split.Tensor", "aten::chunk", "aten::unsafe_split.Tensor")
def _split(low: Lowering, pair: NodePair, x: Value, _: object, dim: int = 0) -> tuple[Value, ...]:
    axis = dim % x.rank
    count = len(pair.small.meta["val"])
    return _pieces(low, x, axis, [pair.output(index)[0][axis] for index in range(count)])


@rule("aten::unbind.int")
def _unbind(low: Lowering, pair: NodePair, x: Value, dim: int = 0) -> tuple[Value, ...]:
    axis = dim % x.rank
    pieces = _pieces(low, x, axis, [1] * len(pair.small.meta["val"]))
    return tuple(low.graph.reshape(piece, pair.output(index)[0]) for index, piece in enumerate(pieces))


@rule("aten::constant_pad_nd")
def _constant_pad(low: Lowering, _: NodePair, x: Value, pad: Sequence[int], fill: float = 0) -> Value:
    before: list[Dim] = [0] * x.rank
    after: list[Dim] = [0] * x.rank
    for index in range(len(pad) // 2):
        before[x.rank - 1 - index], after[x.rank - 1 - index] = pad[2 * index], pad[2 * index + 1]
    return pad_zero(low.graph, x, before, after, fill)


@rule("aten::flip")
def _flip(low: Lowering, _: NodePair, x: Value, dims: Sequence[int]) -> Value:
    return flip(low.graph, x, [dim % x.rank for dim in dims])


def flip(graph: GraphBuilder, x: Value, axes: Sequence[int]) -> Value:
    """Reverse the order along axes."""
    axes = [axis for axis in axes if x.shape[axis] != 1]
    if not axes:
        return x
    count = len(axes)
    ends = (graph.ints([-1] * count), graph.ints([-(2**62)] * count), graph.ints(axes), graph.ints([-1] * count))
    return graph.op("Slice", x, *ends, shape=x.shape)


@rule("aten::repeat")
def _repeat(low: Lowering, pair: NodePair, x: Value, repeats: Sequence[Dim]) -> Value:
    shape: Shape = (*((1,) * (len(repeats) - x.rank)), *x.shape)
    return low.graph.op("Tile", low.graph.reshape(x, shape), low.graph.sizes(tuple(repeats)), shape=pair.shape)
