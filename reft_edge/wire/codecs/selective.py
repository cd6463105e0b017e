"""Selective updating: channels whose relative change is below a threshold stay at home, the others travel as int8.

The relative change of an output channel is ||dw|| / ||w||, dw with what compensation has kept of earlier rounds, so
that a channel which changes little every round travels every few rounds. After the third stage of FL-PQSU (Xu et al.,
IEEE Access 2021, 10.1109/ACCESS.2021.3063291), with a difference: there a whole *device* stays silent in a round in
which its loss has not fallen (the published code compares the last loss with that of its last upload); here every
device says something, but only what is new, and with error feedback nothing is lost.

The channel with the largest relative change of the model always travels: a round is never empty. Bytes: those of int8
for the channels that travel, and a bit for each channel. A contraction with at least the delta of int8 times the share
of the squared norm that travels; without error feedback a bias, because what stays at home is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import BundleError
from reft_edge.wire.codecs.indices import bitmap_indices
from reft_edge.wire.codecs.int8 import LEVELS
from reft_edge.wire.codecs.quantization import dequantize_rows, quantize_rows
from reft_edge.wire.codecs.tensor_codec import INDEX, SCALE, VALUES, Part, row_norms, rows_of

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectiveTensor:
    """`TensorCodec` with the channels that travel; what decodes need not know them."""

    travels: Array = field(default_factory=lambda: np.zeros(0, np.bool_))
    """bool (n_channels,)."""
    cuts_vectors: bool = True

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:  # noqa: ARG002
        return True

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        return {
            VALUES: Part(np.dtype(np.int8), (prod(shape),), longest=True),
            SCALE: Part(np.dtype(np.float32), shape[:1], longest=True),
            INDEX: Part(np.dtype(np.uint8), ((shape[0] + 7) // 8,)),
        }

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:  # noqa: ARG002
        quantized, scales = quantize_rows(rows_of(array)[self.travels], LEVELS, None)
        return {VALUES: quantized.reshape(-1), SCALE: scales, INDEX: np.packbits(self.travels)}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        rows = np.zeros((shape[0], prod(shape[1:])), np.float32)
        travelled = bitmap_indices(parts[INDEX], shape[0])
        values, scales = parts[VALUES], parts[SCALE]
        if scales.size != travelled.size or values.size != travelled.size * rows.shape[1]:
            raise BundleError(f"a tensor has {travelled.size} channels and {scales.size} scales, {values.size} values")
        rows[travelled] = dequantize_rows(values.reshape(travelled.size, rows.shape[1]), scales)
        return rows.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class SelectiveCodec:
    """`ModelCodec`."""

    threshold: float
    decoder: SelectiveTensor = field(default_factory=SelectiveTensor)
    draws: bool = False
    compares: bool = True

    def choose(
        self, tensors: Iterable[tuple[str, FloatArray]], norms: Mapping[str, FloatArray]
    ) -> Callable[[str], SelectiveTensor]:
        changes = {name: relative_change(row_norms(array), norms.get(name)) for name, array in tensors}
        largest = max((float(change.max(initial=0.0)) for change in changes.values()), default=0.0)
        limit = min(self.threshold, largest)
        codecs = {name: SelectiveTensor(travels=(change >= limit) & (change > 0)) for name, change in changes.items()}
        return lambda name: codecs[name]


def relative_change(change: FloatArray, weights: FloatArray | None) -> FloatArray:
    """||dw|| / ||w|| of each channel; where there were no weights, any change is infinitely large."""
    if weights is None or weights.shape != change.shape:
        weights = np.zeros_like(change)
    infinite = np.where(change > 0, np.float32(np.inf), np.float32(0))
    with np.errstate(over="ignore"):
        result: FloatArray = np.divide(change, weights, out=infinite, where=weights > 0)
    return result
