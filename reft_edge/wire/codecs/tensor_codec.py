"""The interface of a codec: one tensor to the container entries that stand for it, and back.

A codec sees float32 tensors of at least two axes; the frame around it (`tensors`) keeps everything else as it is and
checks what comes from the network against `parts` before `decode` sees it. A codec is a value without state, so one
object serves any number of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

VALUES = ""
"""The entry under the tensor's own name. Others carry a suffix."""

SCALE = "::scale"
"""float32 scales: one for each slice of axis 0, or one for the tensor."""

INDEX = "::index"
"""Which entries or channels the values belong to."""

SEED = "::seed"
"""From which the receiver draws the same indices."""

SUFFIXES = (SCALE, INDEX, SEED)
"""No tensor's name may end with one of these."""


class Part(NamedTuple):
    """What one container entry of a tensor must be."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    longest: bool = False
    """Whether `shape`, of one axis, is the longest that may come; how long it is, depends on the values."""
    usual_bytes: float | None = None
    """What updates came to after lossless compression, where that is far from `n_bytes`; for plans."""

    @property
    def n_bytes(self) -> int:
        """At most, before lossless compression."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def expected_bytes(self) -> float:
        return self.n_bytes if self.usual_bytes is None else self.usual_bytes

    def admits(self, array: Array) -> bool:
        if array.dtype != self.dtype or array.ndim != len(self.shape):
            return False
        return array.shape[0] <= self.shape[0] if self.longest else array.shape == self.shape


class TensorCodec(Protocol):
    """How one tensor is encoded."""

    @property
    def cuts_vectors(self) -> bool:
        """Whether tensors of fewer than two axes travel as `vectors` has it, rather than as they are."""

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:
        """Whether values of such a float dtype change; if not, the tensor travels as it is."""

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        """The container entries of a tensor of `shape`, by suffix."""

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:
        """Container entries of finite values, by suffix. `rng` is there if the codec draws random numbers."""

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        """float32 of `shape`. `parts` are of the announced kinds and finite. Raises `BundleError`.

        What the receiver would see as infinite is not looked for here.
        """


class ModelCodec(Protocol):
    """How the tensors of one model are encoded: each by a codec that may be chosen for it."""

    @property
    def draws(self) -> bool:
        """Whether encoding needs random numbers."""

    @property
    def compares(self) -> bool:
        """Whether encoding needs the norms of the weights that the update changes."""

    @property
    def decoder(self) -> TensorCodec:
        """What decodes any tensor of the model."""

    def choose(
        self, tensors: Iterable[tuple[str, FloatArray]], norms: Mapping[str, FloatArray]
    ) -> Callable[[str], TensorCodec]:
        """The codec of each tensor, for encoding.

        `tensors` can be looked through once, by those whose choice depends on values. `norms` is as `row_norms` gives
        it, of the weights; empty unless `compares`.
        """


def rows_of(array: FloatArray) -> FloatArray:
    """Output channels as rows: (n_channels, n_entries of one). A view where the array's memory allows it."""
    return array.reshape(array.shape[0], prod(array.shape[1:]))


def squared_norm(array: FloatArray) -> float:
    """Summed in double precision, without a copy."""
    flat = array.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def row_norms(array: FloatArray) -> FloatArray:
    """Euclidean norm of each output channel: float32 (n_channels,)."""
    rows = rows_of(array)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    result: FloatArray = np.minimum(norms, float(np.finfo(np.float32).max)).astype(np.float32)
    return result
