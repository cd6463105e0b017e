"""Symmetric quantization with a scale for each row: q = round(x / s), s = max|x| / levels.

Rounded to the nearest, the error of an entry is at most s / 2 and never above the entry itself, because 0 is a level.
The largest entry of a row is exact, so for a row of n entries

    ||C(x) - x||^2 <= (1 - delta) ||x||^2   with   delta = max(1 / n, 1 - n / (4 levels^2)).

Rounded by chance (QSGD's rounding: Alistarh et al., arXiv 1610.02132, section 3.1), q = floor(x / s + u) with u uniform
in [0, 1): the expectation of C(x) is x, the error of an entry is below s, its variance at most s^2 / 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray


def quantize_rows(rows: FloatArray, levels: int, rng: np.random.Generator | None) -> tuple[Array, FloatArray]:
    """int8 of -levels to levels, the shape of `rows` (n_rows, n), and float32 scales (n_rows,).

    With `rng`, entries are rounded by chance. Beside its results this needs two float32 copies of `rows` at most.
    """
    scales = (np.abs(rows).max(axis=1, initial=0.0) / np.float32(levels)).astype(np.float32)
    # Rounding up must not make levels * scale overflow, and a scale below the normal numbers has no precision: 0 then.
    scales = np.minimum(scales, _largest_scale(levels))
    scales[scales < np.finfo(np.float32).tiny] = 0.0
    divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
    steps = rows / divisors
    if rng is None:
        np.rint(steps, out=steps)
    else:
        steps += rng.random(steps.shape, dtype=np.float32)
        np.floor(steps, out=steps)
    np.clip(steps, -levels, levels, out=steps)
    return steps.astype(np.int8), scales


def dequantize_rows(quantized: Array, scales: Array) -> FloatArray:
    """Inverse of `quantize_rows` up to the rounding: float32 (n_rows, n). Absurd `scales` give infinities."""
    with np.errstate(over="ignore"):
        result: FloatArray = quantized.astype(np.float32)
        result *= scales[:, None]
    return result


def _largest_scale(levels: int) -> np.float32:
    """The largest float32 that stays finite times `levels`."""
    return np.float32(np.nextafter(np.finfo(np.float32).max / np.float32(levels), np.float32(0)))
