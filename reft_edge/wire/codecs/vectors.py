"""Biases, norm weights and running statistics beside coarse tensors: the upper half of each float32, 2 bytes.

Where the large tensors take half a byte an entry or less, what has one axis would be a fifth of the blob and more. Half
of the mantissa is cut off, which leaves the sign, the exponent and 7 bits: rounding towards zero, by less than 2^-7 of
the entry, so ||C(x) - x||^2 <= 2^-14 ||x||^2. The two bytes lie apart, all upper ones first: exponents compress.

Towards zero, because what is added to weights lies then between nothing and the whole change, and a variance that
training left above zero stays there. For the same reason no compensation is applied to vectors: a residual from an
earlier round could push a variance below zero, and the coordinator would reject the update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.tensor_codec import Part

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray

BYTES_EACH = 2


def vector_part(n: int) -> Part:
    """The container entry of a float32 tensor of `n` entries."""
    return Part(np.dtype(np.uint8), (BYTES_EACH * n,))


def cut_vector(array: FloatArray) -> Array:
    """uint8 (2 n,) of float32 values."""
    halves = np.ascontiguousarray(array, "<f4").reshape(-1).view("<u4") >> 16
    return np.concatenate([halves >> 8, halves & 255]).astype(np.uint8)


def read_vector(data: Array, shape: tuple[int, ...]) -> FloatArray:
    """float32 of `shape`. A sender may have written infinities."""
    upper, lower = data.reshape(BYTES_EACH, -1).astype(np.uint32)
    values: FloatArray = ((upper << 24) | (lower << 16)).astype("<u4").view("<f4").reshape(shape)
    return values
