"""The values of a sparse tensor: float32, or int8 with one scale for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codec_names import SparseValues
from reft_edge.wire.codecs.int8 import LEVELS
from reft_edge.wire.codecs.quantization import dequantize_rows, quantize_rows
from reft_edge.wire.codecs.tensor_codec import SCALE, VALUES, Part

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors


def value_parts(kind: SparseValues, k: int) -> Mapping[str, Part]:
    """Container entries of `k` values."""
    if kind == "float32":
        return {VALUES: Part(np.dtype(np.float32), (k,))}
    return {VALUES: Part(np.dtype(np.int8), (k,)), SCALE: Part(np.dtype(np.float32), (1,))}


def encode_values(values: FloatArray, kind: SparseValues, rng: np.random.Generator | None) -> dict[str, Array]:
    """Container entries of values (k,); int8 is rounded by chance with `rng`, else to the nearest."""
    if kind == "float32":
        return {VALUES: values}
    quantized, scales = quantize_rows(values[None], LEVELS, rng)
    return {VALUES: quantized[0], SCALE: scales}


def decode_values(parts: Tensors, kind: SparseValues) -> FloatArray:
    """float32 (k,)."""
    if kind == "float32":
        return parts[VALUES]
    values: FloatArray = dequantize_rows(parts[VALUES][None], parts[SCALE])[0]
    return values
