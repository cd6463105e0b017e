"""Tensors that are computed when somebody asks for them, so that no second copy of a model is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors


class Derived(Mapping[str, "Array"]):
    """`tensors` under the same names, each passed through `change(name, tensor)` whenever it is read."""

    def __init__(self, tensors: Tensors, change: Callable[[str, Array], Array]) -> None:
        self._tensors = tensors
        self._change = change

    def __getitem__(self, name: str) -> Array:
        return self._change(name, np.asarray(self._tensors[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def added(tensor: Array, correction: Array | None, *, sign: Literal[1, -1] = 1) -> Array:
    """`tensor` plus or minus `correction`, in its own dtype; one that is missing or of another shape is left out."""
    if correction is None or correction.shape != tensor.shape or tensor.dtype.kind != "f":
        return tensor
    changed: Array = tensor + correction if sign > 0 else tensor - correction
    return changed.astype(tensor.dtype, copy=False)
