"""Random-k: k entries drawn by chance; the receiver draws the same from a seed, so that only values travel.

The tensor is cut into blocks of 65,536 entries, and of each block of m entries k = ceil(fraction m) are drawn: those
with the smallest of m pseudo-random keys (splitmix64 of the seed and the position, so it is the same everywhere and
does not depend on numpy's generators). Two forms:

- contraction (`unbiased` off): the values as they are. E||C(x) - x||^2 = (1 - k / m) ||x||^2, and ||C(x) - x|| <= ||x||
  always. For error feedback.
- unbiased: the values times m / k, so E C(x) = x with E||C(x) - x||^2 = (m / k - 1) ||x||^2 (Wangni et al., arXiv
  1710.09854; MASHA1's compressor, arXiv 2110.03313). int8 values are then rounded by chance, else to the nearest. No
  contraction: without error feedback.

A byte for each entry that travels, half of top-k's, for a larger error: it takes what it gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codec_names import SparseValues
from reft_edge.wire.codecs.sparse_values import decode_values, encode_values, value_parts
from reft_edge.wire.codecs.tensor_codec import SEED, Part
from reft_edge.wire.codecs.top_k import n_kept

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, IntArray, Tensors

BLOCK = 1 << 16
"""Entries from which indices are drawn together: keys take 8 bytes an entry, so a tensor must not have them all."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
"""splitmix64 (Steele, Lea and Flood 2014): what a position is multiplied with, and the shifts and factors after it."""


@dataclass(frozen=True, kw_only=True)
class RandomKCodec:
    """`TensorCodec`."""

    fraction: float
    values: SparseValues
    unbiased: bool
    cuts_vectors: bool = True

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:  # noqa: ARG002
        return True

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        k = sum(k for _, k in _blocks(self.fraction, prod(shape)))
        return {**value_parts(self.values, k), SEED: Part(np.dtype(np.int64), ())}

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:
        if rng is None:
            raise ValueError("random_k draws its indices; it needs a generator")
        seed = np.array(rng.integers(2**63), np.int64)
        flat = array.reshape(-1)
        values = flat[drawn(int(seed), self.fraction, flat.size)]
        return {**encode_values(values, self.values, rng if self.unbiased else None), SEED: seed}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        n = prod(shape)
        dense = np.zeros(n, np.float32)
        values = decode_values(parts, self.values)
        if self.unbiased:  # scaled here, where a value that overflows is found
            blocks = _blocks(self.fraction, n)
            with np.errstate(over="ignore"):
                values = values * np.repeat(np.array([m / k for m, k in blocks], np.float32), [k for _, k in blocks])
        dense[drawn(int(parts[SEED]), self.fraction, n)] = values
        return dense.reshape(shape)


def drawn(seed: int, fraction: float, n: int) -> IntArray:
    """Rising indices below `n`, the same for the same seed on every platform."""
    chosen = [
        number * BLOCK + _drawn_in_block(seed, number * BLOCK, m, k)
        for number, (m, k) in enumerate(_blocks(fraction, n))
    ]
    return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def _blocks(fraction: float, n: int) -> list[tuple[int, int]]:
    """Of each block: its entries and how many of them are drawn."""
    sizes = [min(BLOCK, n - start) for start in range(0, n, BLOCK)]
    return [(m, n_kept(fraction, m)) for m in sizes]


def _drawn_in_block(seed: int, start: int, m: int, k: int) -> IntArray:
    """Rising positions in the block that begins at `start`."""
    keys = np.arange(start + 1, start + m + 1, dtype=np.uint64) * _GOLDEN + np.uint64(seed % 2**64)
    for shift, factor in _MIX:
        keys = (keys ^ (keys >> shift)) * factor
    keys ^= keys >> np.uint64(31)
    keys = (keys & ~np.uint64(BLOCK - 1)) | np.arange(m, dtype=np.uint64)  # no two alike: the draw is well defined
    return np.sort(np.argpartition(keys, k - 1)[:k])
