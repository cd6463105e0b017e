"""Where the windows of a convolution lie, and sizes that must not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from reft_edge.compile.symbols import Affine, Dim, Shape
from reft_edge.errors import ModelError


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation for each spatial axis, and the number of groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls, rank: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> Geometry:
        """For a tensor of `rank` axes, of which the first two are not spatial; single numbers hold for all."""

        def each(numbers: Sequence[int]) -> tuple[int, ...]:
            return tuple(numbers) if len(numbers) == rank - 2 else tuple(numbers) * (rank - 2)

        return cls(each(stride), each(padding), each(dilation), groups)


def places_of(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """All places of a kernel, in the order of its memory."""
    return list(product(*(range(k) for k in kernel)))


def size_of(dim: Dim) -> int:
    if isinstance(dim, Affine):
        raise ModelError("a convolution over the batch axis cannot be compiled")
    return dim


def sizes_of(shape: Shape) -> tuple[int, ...]:
    return tuple(size_of(dim) for dim in shape)
