"""Layer-wise bit allocation: of all ways to quantize the tensors of a model, the smallest within an error budget.

Tensor l is quantized in steps of s_l = max|x_l| / m with m one of `LEVELS` (0: it stays at home) and stored as bit
planes. Chosen is

    min sum_l bytes_l(m_l)   with   sum_l ||C(x_l) - x_l||^2 <= budget^2 sum_l ||x_l||^2

by dynamic programming over the tensors (L-GreCo: Alimohammadi et al., arXiv 2210.17357, algorithm 1), the errors in
units of a thousandth of the budget and rounded up, so the bound holds. Bytes are estimated by the entropy of the
quantized values, because zstandard comes close to it; errors are exact. So for error feedback this is a contraction
with delta = 1 - budget^2; where not even the finest levels meet the budget, they are taken.

One scale for a tensor and not for each channel: with entropy coding one step everywhere has the least error for its
bytes, and small channels take few bits anyway. Deliberately without the paper's choice of a codec for each layer, and
without its adaptation every thousand steps: an update is encoded once a round, so each has its own allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reft_edge.wire.codecs.bit_planes import longest_plane_bytes, pack_planes, unpack_planes
from reft_edge.wire.codecs.quantization import dequantize_rows
from reft_edge.wire.codecs.tensor_codec import SCALE, VALUES, Part, squared_norm

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

LEVELS = (0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 90, 127)
"""Largest magnitudes to choose from: half a bit apart."""

ENTRY_BYTES = 40.0
"""Of a tensor that travels, beside its values: scale and header, compressed."""

BUDGET_UNITS = 1000
"""The error budget is cut into as many parts, or 20 for each tensor where that is more: rounding up wastes one each."""


class Candidate(NamedTuple):
    """What one number of levels makes of one tensor."""

    squared_error: float
    n_bytes: float


@dataclass(frozen=True, kw_only=True)
class LayerWiseTensor:
    """`TensorCodec` with a number of levels. Which, the receiver need not know."""

    levels: int
    error_budget: float
    cuts_vectors: bool = True

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:  # noqa: ARG002
        return True

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        n = prod(shape)
        usual = usual_bits(self.error_budget) * n / 8
        values = Part(np.dtype(np.uint8), (longest_plane_bytes(n),), longest=True, usual_bytes=usual)
        return {VALUES: values, SCALE: Part(np.dtype(np.float32), (1,))}

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:  # noqa: ARG002
        quantized, scale = _quantize(array.reshape(-1), self.levels)
        return {VALUES: pack_planes(quantized), SCALE: np.array([scale], np.float32)}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        quantized = unpack_planes(parts[VALUES], prod(shape))
        values: FloatArray = dequantize_rows(quantized[None], parts[SCALE])[0].reshape(shape)
        return values


@dataclass(frozen=True, kw_only=True)
class LayerWiseCodec:
    """`ModelCodec`."""

    error_budget: float
    draws: bool = False
    compares: bool = False

    @property
    def decoder(self) -> LayerWiseTensor:
        return LayerWiseTensor(levels=LEVELS[-1], error_budget=self.error_budget)

    def choose(
        self,
        tensors: Iterable[tuple[str, FloatArray]],
        norms: Mapping[str, FloatArray],  # noqa: ARG002
    ) -> Callable[[str], LayerWiseTensor]:
        candidates = {name: candidates_of(array.reshape(-1)) for name, array in tensors}
        chosen = allocate(list(candidates.values()), self.error_budget**2)
        levels = {name: LEVELS[i] for name, i in zip(candidates, chosen, strict=True)}
        return lambda name: LayerWiseTensor(levels=levels[name], error_budget=self.error_budget)


def usual_bits(error_budget: float) -> float:
    """Of an entry: the rate-distortion function of a normal distribution, log2(1 / error).

    A quantizer is above it and updates, whose entries and layers are uneven, are below it. Measured with two nets at
    budgets of 0.15, 0.3, 0.5 and 0.7: 0.4 to 1.0 times as many.
    """
    return log2(1 / error_budget)


def candidates_of(flat: FloatArray) -> list[Candidate]:
    """Exact error and estimated bytes under each of `LEVELS`. The first is that of staying at home."""
    found = [Candidate(squared_norm(flat), 0.0)]
    for levels in LEVELS[1:]:
        quantized, scale = _quantize(flat, levels)
        counts = np.bincount(quantized.view(np.uint8), minlength=256)
        error = squared_norm(flat - dequantize_rows(quantized[None], np.array([scale]))[0])
        found.append(Candidate(error, ENTRY_BYTES + _entropy_bytes(counts)))
    return found


def allocate(layers: Sequence[Sequence[Candidate]], budget: float) -> list[int]:
    """For each layer, which candidate to take: the fewest bytes whose errors are within `budget` of the total.

    The first candidate of a layer is its error when it stays at home, the last its finest.
    """
    total = sum(layer[0].squared_error for layer in layers)
    units = max(BUDGET_UNITS, 20 * len(layers))
    if total == 0:
        return [0] * len(layers)
    least = np.zeros(units + 1)  # bytes of the layers so far, if they have at most this error; index: units
    choices: list[Array] = []
    for layer in layers:
        best = np.full(units + 1, np.inf)
        choice = np.zeros(units + 1, np.int64)
        for i, candidate in enumerate(layer):
            cost = int(np.ceil(candidate.squared_error / (budget * total) * units))
            if cost > units:
                continue
            bytes_then = least[: units + 1 - cost] + candidate.n_bytes
            better = bytes_then < best[cost:]
            best[cost:][better] = bytes_then[better]
            choice[cost:][better] = i
        least = best
        choices.append(choice)
    if not np.isfinite(least[units]):
        return [len(layer) - 1 for layer in layers]
    taken: list[int] = []
    left = units
    for layer, choice in zip(reversed(layers), reversed(choices), strict=True):
        i = int(choice[left])
        taken.append(i)
        left -= int(np.ceil(layer[i].squared_error / (budget * total) * units))
    return taken[::-1]


def _quantize(flat: FloatArray, levels: int) -> tuple[Array, np.float32]:
    """int8 (n,) between -levels and levels, and the step."""
    largest = np.abs(flat).max(initial=0.0)
    if levels == 0 or largest / max(levels, 1) < np.finfo(np.float32).tiny:
        return np.zeros(flat.shape, np.int8), np.float32(0)
    # A step whose product with `levels` is finite, whatever the rounding.
    scale = min(
        np.float32(largest / levels), np.nextafter(np.finfo(np.float32).max / np.float32(levels), np.float32(0))
    )
    steps = flat / scale
    np.rint(steps, out=steps)
    np.clip(steps, -levels, levels, out=steps)
    return steps.astype(np.int8), np.float32(scale)


def _entropy_bytes(counts: Array) -> float:
    """Of as many values, by the entropy of their distribution."""
    present = counts[counts > 0]
    shares = present / present.sum()
    return float(-(present * np.log2(shares)).sum() / 8) if present.size else 0.0
