"""`ChannelMap`: which entry of the global tensors each entry of a variant's tensors is.

A variant is the global model with channels left out. For every tensor of the variant's `state_dict()` the map holds the
flat index of each entry in the global tensor of the same name. That is the most general form: it is right for a
flattened feature map that feeds a linear layer, for grouped convolutions, and for concatenated branches alike.

Nearly all maps are a choice of positions along each axis, so that is how they are kept: VGG16's map then takes
kilobytes where flat indices take 8 bytes a parameter. `indices` gives the flat form on demand.

Pure numpy: merging needs maps where no torch is wanted. How channels are chosen is in `compile.prune`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.bundle.container import container_limit, pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import is_possible_shape
from reft_edge.errors import BundleError, ModelError

if TYPE_CHECKING:
    from reft_edge.types import Array, IntArray, Tensors

Shape = tuple[int, ...]

FORMAT = "reft channel map 1"

MAX_MAP_BYTES = 1 << 30
"""1 GiB decompressed: flat indices of 134 million entries. Maps are the coordinator's own files."""

MAX_AXIS_ENTRIES = 1 << 26
"""Of all axes of all tensors: 512 MiB of positions, for which a file needs no more than to name the sizes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Selection:
    """The entries of one global tensor that a variant holds.

    Either `axes`, the positions kept along each axis (int64, increasing), or `flat` (int64, in the variant's shape).
    """

    shape: Shape
    """Of the global tensor."""
    axes: tuple[IntArray, ...] | None = None
    flat: IntArray | None = None

    @property
    def variant_shape(self) -> Shape:
        return tuple(map(len, self.axes)) if self.axes is not None else self._flat.shape

    @property
    def _flat(self) -> IntArray:
        if self.flat is None:
            raise BundleError("a selection has neither axes nor flat indices")
        return self.flat

    @property
    def complete(self) -> bool:
        """Whether it is the whole global tensor, in its order."""
        return self.axes is not None and self.variant_shape == self.shape

    def indices(self) -> IntArray:
        """Flat indices into the global tensor, int64, in the variant's shape."""
        if self.axes is None:
            return self._flat
        total = np.zeros((1,) * len(self.shape), np.int64)
        stride = 1
        for axis in reversed(range(len(self.shape))):
            steps = self.axes[axis] * stride
            total = total + steps.reshape((-1,) + (1,) * (len(self.shape) - axis - 1))
            stride *= self.shape[axis]
        return total.reshape(self.variant_shape)

    def take(self, tensor: Array) -> Array:
        """A copy of the selected entries."""
        if self.complete:
            return tensor.copy()
        if self.axes is not None:
            return tensor[np.ix_(*self.axes)]
        return tensor.reshape(-1)[self._flat]

    def put(self, values: Array, into: Array) -> None:
        """Write `values` at the selected entries of `into`."""
        if self.complete:
            into[...] = values
        elif self.axes is not None:
            into[np.ix_(*self.axes)] = values
        else:
            into[np.unravel_index(self._flat, self.shape)] = values

    def add(self, values: Array | float, into: Array) -> None:
        """Add `values` to the selected entries of `into`."""
        if self.complete:
            into += values
        elif self.axes is not None:
            into[np.ix_(*self.axes)] += values
        else:
            into[np.unravel_index(self._flat, self.shape)] += values

    def compose(self, inner: _Selection) -> _Selection:
        """The selection of `inner`, which selects from this one's variant, in terms of this one's global tensor."""
        if self.axes is not None and inner.axes is not None:
            axes = tuple(outer[kept] for outer, kept in zip(self.axes, inner.axes, strict=True))
            return _Selection(shape=self.shape, axes=axes)
        return _select(self.indices().reshape(-1)[inner.indices()], self.shape, "")


class _Indices(Mapping[str, "IntArray"]):
    """The flat indices of every tensor, made when they are asked for."""

    def __init__(self, selections: Mapping[str, _Selection]) -> None:
        self._selections = selections

    def __getitem__(self, name: str) -> IntArray:
        return self._selections[name].indices()

    def __iter__(self) -> Iterator[str]:
        return iter(self._selections)

    def __len__(self) -> int:
        return len(self._selections)


class ChannelMap:
    """Where a variant's tensors lie in the global tensors.

    `indices`: for each name, int64 flat indices into the global tensor, in the shape of the variant's tensor.
    `global_shapes`: the shape of each global tensor. Every index must be in range and occur once, else `ModelError`.
    """

    def __init__(self, indices: Mapping[str, IntArray], global_shapes: Mapping[str, Shape]) -> None:
        if odd := sorted(indices.keys() ^ global_shapes.keys()):
            raise ModelError(f"channel map: {odd[0]!r} has indices or a global shape, but not both")
        self._selections = {
            name: _select(np.asarray(flat), tuple(global_shapes[name]), name) for name, flat in indices.items()
        }

    @classmethod
    def _of(cls, selections: Mapping[str, _Selection]) -> ChannelMap:
        made = cls.__new__(cls)
        made._selections = dict(selections)
        return made

    @classmethod
    def identity(cls, tensors: Tensors) -> ChannelMap:
        """The map of the unpruned model."""
        return cls._of({name: _whole(tuple(np.shape(tensor))) for name, tensor in tensors.items()})

    @property
    def indices(self) -> Mapping[str, IntArray]:
        """Flat indices by tensor name; each look-up builds the array."""
        return _Indices(self._selections)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._selections)

    @property
    def variant_shapes(self) -> dict[str, Shape]:
        return {name: selection.variant_shape for name, selection in self._selections.items()}

    @property
    def global_shapes(self) -> dict[str, Shape]:
        return {name: selection.shape for name, selection in self._selections.items()}

    @property
    def share(self) -> float:
        """Entries that the variant holds, as a fraction of the global model's."""
        total = sum(map(prod, self.global_shapes.values()))
        return sum(map(prod, self.variant_shapes.values())) / total if total else 1.0

    @property
    def is_identity(self) -> bool:
        return all(selection.complete for selection in self._selections.values())

    def gather(self, global_tensors: Tensors) -> dict[str, Array]:
        """The variant's tensors, copied out of the global ones. Raises `ModelError` when shapes differ."""
        self._check(global_tensors, self.global_shapes, "global")
        return {name: selection.take(global_tensors[name]) for name, selection in self._selections.items()}

    def scatter(self, variant_tensors: Tensors, into: Mapping[str, Array]) -> None:
        """Write the variant's tensors to their places in the global arrays `into`, which change in place.

        Entries that the variant lacks stay as they are. Raises `ModelError`, and changes nothing, when shapes differ.
        """
        self._check(variant_tensors, self.variant_shapes, "variant")
        self._check(into, self.global_shapes, "global")
        for name, selection in self._selections.items():
            selection.put(variant_tensors[name], into[name])

    def add(self, name: str, values: Array | float, into: Array) -> None:
        """Add `values` (in the variant's shape) to the entries of the global array `into` that the variant holds.

        `into` changes in place: this is how updates are summed without a copy of global size. Raises `ModelError`.
        """
        self._fitting(name, values, into).add(values, into)

    def put(self, name: str, values: Array, into: Array) -> None:
        """Write `values` (in the variant's shape) to the entries of the global array `into` that the variant holds.

        As `scatter`, for one tensor. Raises `ModelError`.
        """
        self._fitting(name, values, into).put(values, into)

    def _fitting(self, name: str, values: Array | float, into: Array) -> _Selection:
        """The selection of `name`, if the shapes are its own. Raises `ModelError`."""
        selection = self._selections.get(name)
        if selection is None:
            raise ModelError(f"channel map: the variant has no tensor {name!r}")
        if into.shape != selection.shape or np.shape(values) not in ((), selection.variant_shape):
            raise ModelError(
                f"channel map: {name!r} maps {selection.variant_shape} into {selection.shape}, "
                f"not {np.shape(values)} into {into.shape}"
            )
        return selection

    def compose(self, inner: ChannelMap) -> ChannelMap:
        """The map of a variant's variant: `inner` maps into this one's variant. Raises `ModelError`."""
        if inner.global_shapes != self.variant_shapes:
            raise ModelError("channel maps do not compose: the inner one belongs to another variant")
        return ChannelMap._of(
            {name: outer.compose(inner._selections[name]) for name, outer in self._selections.items()}
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelMap):
            return NotImplemented
        return self.global_shapes == other.global_shapes and all(
            np.array_equal(flat, other.indices[name]) for name, flat in self.indices.items()
        )

    __hash__ = None  # type: ignore[assignment]  # equality is by content, and the content is large

    def to_bytes(self) -> bytes:
        """The map as a tensor container, the same bytes for equal maps."""
        tensors: dict[str, Array] = {}
        for name, selection in self._selections.items():
            if selection.axes is None:
                tensors[f"{name}|flat"] = selection.indices()
                continue
            for axis, kept in enumerate(selection.axes):
                if len(kept) != selection.shape[axis]:
                    tensors[f"{name}|{axis}"] = kept
        shapes = msgspec.json.encode(self.global_shapes, order="sorted").decode()
        return pack_tensors(tensors, {"format": FORMAT, "shapes": shapes})

    @classmethod
    def from_bytes(cls, data: bytes) -> ChannelMap:
        """Inverse of `to_bytes`. Raises `BundleError` when the bytes are not a map or the map is not valid."""
        tensors, metadata = unpack_tensors(data, max_bytes=container_limit(MAX_MAP_BYTES))
        if metadata.get("format") != FORMAT:
            raise BundleError(f"not a channel map of format {FORMAT!r}")
        try:
            shapes = msgspec.json.decode(metadata.get("shapes", ""), type=dict[str, Shape])
        except msgspec.MsgspecError as exc:
            raise BundleError(f"channel map has malformed shapes: {exc}") from exc
        if sum(max(size, 0) for shape in shapes.values() for size in shape) > MAX_AXIS_ENTRIES:
            raise BundleError(f"channel map has axes of more than {MAX_AXIS_ENTRIES} entries")
        selections = {name: _read_selection(name, shape, tensors) for name, shape in shapes.items()}
        if tensors:
            raise BundleError(f"channel map has indices of an unknown tensor: {min(tensors)!r}")
        return cls._of(selections)

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> ChannelMap:
        """Read what `save` wrote. Raises `BundleError`."""
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise BundleError(f"{path} cannot be read: {exc.strerror or exc}") from exc
        return cls.from_bytes(data)

    def _check(self, tensors: Mapping[str, Array], shapes: Mapping[str, Shape], kind: str) -> None:
        for name, shape in shapes.items():
            if name not in tensors:
                raise ModelError(f"channel map: the {kind} tensors lack {name!r}")
            if tuple(np.shape(tensors[name])) != shape:
                raise ModelError(f"channel map: {kind} {name!r} is {np.shape(tensors[name])}, expected {shape}")
        if len(tensors) != len(shapes):
            raise ModelError(f"channel map: unknown {kind} tensor {min(tensors.keys() - shapes.keys())!r}")


def _whole(shape: Shape) -> _Selection:
    return _Selection(shape=shape, axes=tuple(np.arange(size, dtype=np.int64) for size in shape))


def _select(flat: Array, shape: Shape, name: str) -> _Selection:
    """The selection that `flat` (integers, in the variant's shape) describes, by axes where it is a product of them."""
    size = prod(shape)
    if not np.issubdtype(flat.dtype, np.integer) or flat.ndim != len(shape):
        raise ModelError(f"channel map: {name!r} has indices {flat.dtype} {flat.shape} into a tensor of {shape}")
    if flat.size and (flat.min() < 0 or flat.max() >= size):
        raise ModelError(f"channel map: {name!r} points outside the {size} entries of its global tensor")
    flat = flat.astype(np.int64, copy=False)
    candidate = _Selection(shape=shape, axes=_axes_of(flat, shape))
    if _strictly_increasing(candidate.axes) and np.array_equal(candidate.indices(), flat):
        return candidate
    held = np.zeros(size, np.bool_)
    held[flat.reshape(-1)] = True
    if np.count_nonzero(held) != flat.size:
        raise ModelError(f"channel map: {name!r} names an entry of its global tensor twice")
    return _Selection(shape=shape, flat=flat)


def _axes_of(flat: IntArray, shape: Shape) -> tuple[IntArray, ...]:
    """The positions along each axis, if `flat` is a product of positions: those of the entries next to the first."""
    if flat.size == 0:
        return tuple(np.arange(size, dtype=np.int64) for size in flat.shape)
    axes = []
    for axis in range(len(shape)):
        line = flat[tuple(slice(None) if other == axis else 0 for other in range(len(shape)))]
        axes.append(line // prod(shape[axis + 1 :]) % shape[axis])
    return tuple(axes)


def _strictly_increasing(axes: tuple[IntArray, ...] | None) -> bool:
    return axes is not None and all(bool(np.all(np.diff(kept) > 0)) for kept in axes)


def _read_selection(name: str, shape: Shape, tensors: dict[str, Array]) -> _Selection:
    """Take the selection of `name` out of `tensors`; raises `BundleError`."""
    if not is_possible_shape(shape):
        raise BundleError(f"channel map: {name!r} has an impossible global shape {shape!r}")
    if f"{name}|flat" in tensors:
        try:
            return _select(tensors.pop(f"{name}|flat"), shape, name)
        except ModelError as exc:
            raise BundleError(str(exc)) from exc
    axes = []
    for axis, size in enumerate(shape):
        kept = tensors.pop(f"{name}|{axis}", None)
        if kept is None:
            kept = np.arange(size, dtype=np.int64)
        elif kept.dtype != np.int64 or kept.ndim != 1 or not _strictly_increasing((kept,)):
            raise BundleError(f"channel map: {name!r} has malformed positions along axis {axis}")
        elif kept.size and (kept[0] < 0 or kept[-1] >= size):
            raise BundleError(f"channel map: {name!r} points outside axis {axis} of {size}")
        axes.append(kept)
    return _Selection(shape=shape, axes=tuple(axes))
