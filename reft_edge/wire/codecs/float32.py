"""Tensors as they are: exact, 4 bytes an entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.tensor_codec import VALUES, Part

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors


class Float32Codec:
    """`TensorCodec` that changes nothing."""

    cuts_vectors = False

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:  # noqa: ARG002
        return False

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        return {VALUES: Part(np.dtype(np.float32), shape)}

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:  # noqa: ARG002
        return {VALUES: array}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        values: FloatArray = parts[VALUES].reshape(shape)
        return values
