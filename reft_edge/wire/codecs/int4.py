"""int4 with a scale for each output channel, two entries in a byte: half of int8's bytes, and 4 a channel.

q of -7 to 7 is stored as q + 8, so 0 is never used; the lower half of a byte comes first, and a last half that belongs
to no entry is 8. `quantization` has the rounding, its error and its contraction factor, to the nearest or by chance.
Error feedback belongs to it: one message has about 15% of error, int8 has 1%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import BundleError
from reft_edge.wire.codecs.quantization import dequantize_rows, quantize_rows
from reft_edge.wire.codecs.tensor_codec import SCALE, VALUES, Part, rows_of

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

LEVELS = 7
_ZERO = 8


@dataclass(frozen=True, kw_only=True)
class Int4Codec:
    """`TensorCodec`."""

    stochastic: bool = False
    cuts_vectors: bool = True

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:  # noqa: ARG002
        return True

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        n_bytes = (prod(shape) + 1) // 2
        return {VALUES: Part(np.dtype(np.uint8), (n_bytes,)), SCALE: Part(np.dtype(np.float32), shape[:1])}

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:
        quantized, scales = quantize_rows(rows_of(array), LEVELS, rng if self.stochastic else None)
        return {VALUES: pack_halves(quantized.reshape(-1)), SCALE: scales}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        quantized = unpack_halves(parts[VALUES], prod(shape))
        return dequantize_rows(rows_of(quantized.reshape(shape)), parts[SCALE]).reshape(shape)


def pack_halves(quantized: Array) -> Array:
    """uint8 ((n + 1) // 2,) of int8 (n,) between -7 and 7."""
    halves = (quantized + np.int8(_ZERO)).view(np.uint8)
    if halves.size % 2:
        halves = np.append(halves, np.uint8(_ZERO))
    return halves[::2] | (halves[1::2] << 4)


def unpack_halves(packed: Array, n: int) -> Array:
    """Inverse of `pack_halves`: int8 (n,). Raises `BundleError` for halves that it does not make."""
    halves = np.empty(2 * packed.size, np.uint8)
    halves[::2] = packed & 15
    halves[1::2] = packed >> 4
    if halves.size and (halves.min() == 0 or (halves[n:] != _ZERO).any()):
        raise BundleError("int4 tensor has half bytes that stand for no value")
    return halves[:n].view(np.int8) - np.int8(_ZERO)
