"""Tensors as float16: 2 bytes an entry, each rounded to 11 bits.

The relative error of an entry is at most 2^-11; below 6e-5 the error is at most 3e-8, beyond 65504 the entry becomes
65504. So ||C(x) - x||^2 <= 2^-22 ||x||^2 for what lies in float16's normal range: contraction with delta = 1 - 2^-22.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.tensor_codec import VALUES, Part

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

_LIMIT = float(np.finfo(np.float16).max)


class Float16Codec:
    """`TensorCodec`."""

    cuts_vectors = False

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:
        return dtype.itemsize > 2

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        return {VALUES: Part(np.dtype(np.float16), shape)}

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:  # noqa: ARG002
        return {VALUES: np.clip(array, -_LIMIT, _LIMIT).astype(np.float16)}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        values: FloatArray = parts[VALUES].reshape(shape).astype(np.float32)
        return values
