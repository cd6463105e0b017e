"""int8 with a scale for each output channel: 1 byte an entry and 4 a channel, a little less after compression.

`quantization` has the rounding and its error, to the nearest or by chance. -128 is not used: symmetric, so that
negating an update negates its encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.quantization import dequantize_rows, quantize_rows
from reft_edge.wire.codecs.tensor_codec import SCALE, VALUES, Part, rows_of

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

LEVELS = 127


@dataclass(frozen=True, kw_only=True)
class Int8Codec:
    """`TensorCodec`."""

    stochastic: bool = False
    cuts_vectors: bool = False

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:  # noqa: ARG002
        return True

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        return {VALUES: Part(np.dtype(np.int8), shape), SCALE: Part(np.dtype(np.float32), shape[:1])}

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:
        quantized, scales = quantize_rows(rows_of(array), LEVELS, rng if self.stochastic else None)
        return {VALUES: quantized.reshape(array.shape), SCALE: scales}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        return dequantize_rows(rows_of(parts[VALUES]), parts[SCALE]).reshape(shape)
