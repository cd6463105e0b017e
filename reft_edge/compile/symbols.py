"""Numbers that depend on the batch size, found by tracing twice.

A training step is traced with two concrete batch sizes. A number that is the same in both traces is a constant; one
that differs is taken as affine in the batch size. This replaces symbolic shapes: it needs no guards, never
specialises on a batch of one, and notices (rather than guesses) when a model does something else with the batch axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from reft_edge.errors import ModelError

SMALL_BATCH = 6
LARGE_BATCH = 10
"""The two traced batch sizes: above one, which torch treats specially, and with a difference that exposes division."""


@dataclass(frozen=True)
class Affine:
    """The number `slope * n_batch + offset`."""

    slope: int
    offset: int = 0

    def at(self, n_batch: int) -> int:
        return self.slope * n_batch + self.offset

    def __mul__(self, factor: int) -> Affine:
        return Affine(self.slope * factor, self.offset * factor)

    __rmul__ = __mul__


Dim: TypeAlias = int | Affine
Shape: TypeAlias = tuple[Dim, ...]


def pair_number(small: float, large: float) -> float | Affine:
    """One number out of two traces. Raises `ModelError` when it is not affine in the batch size."""
    if small == large or (small != small and large != large):
        return small
    step, remainder = divmod(large - small, LARGE_BATCH - SMALL_BATCH)
    if remainder or not (float(small).is_integer() and float(large).is_integer()):
        raise ModelError(
            f"a number that the model computes from the batch size ({small!r}, {large!r}) is not affine in it"
        )
    return Affine(int(step), int(small - step * SMALL_BATCH))


def pair_shape(small: Sequence[int], large: Sequence[int]) -> Shape:
    """A shape out of two traces."""
    if len(small) != len(large):
        raise ModelError("a tensor's rank depends on the batch size")
    dims = [pair_number(int(a), int(b)) for a, b in zip(small, large, strict=True)]
    return tuple(dim if isinstance(dim, Affine) else int(dim) for dim in dims)


def n_elements(shape: Shape) -> Dim:
    """Product of the sizes. Raises `ModelError` when two of them depend on the batch size."""
    symbolic = [dim for dim in shape if isinstance(dim, Affine)]
    fixed = prod(dim for dim in shape if not isinstance(dim, Affine))
    if len(symbolic) > 1:
        raise ModelError(f"two axes of one tensor depend on the batch size: {shape!r}")
    return symbolic[0] * fixed if symbolic else fixed


def broadcast(*shapes: Shape) -> Shape:
    """Shape of an elementwise result, by numpy's rule."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    result: list[Dim] = []
    for dims in zip(*padded, strict=True):
        larger = [dim for dim in dims if dim != 1]
        result.append(larger[0] if larger else 1)
    return tuple(result)


def at_batch(shape: Shape, n_batch: int) -> tuple[int, ...]:
    """The shape with the batch size put in."""
    return tuple(dim.at(n_batch) if isinstance(dim, Affine) else dim for dim in shape)
