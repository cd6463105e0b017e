"""Top-k: the k entries of a tensor that are largest in magnitude; the others are 0 for the receiver.

k = ceil(fraction n) of each tensor's n entries, so that no layer is starved by another (as in deep gradient
compression, arXiv 1712.01887). A contraction, not unbiased: with exact values

    ||C(x) - x||^2 <= (1 - k / n) ||x||^2

(Stich et al., arXiv 1809.07599, lemma A.1), with int8 values k / n times the factor of `quantization` for k entries. It
is MASHA2's compressor (arXiv 2110.03313), and needs compensation: without, what is never among the largest is never
learned. About 2 bytes for each entry that travels: a byte for the value and less than one for its place (`indices`).

Deliberately not over the whole model at once: that needs all tensors in memory, and one scale for layers whose updates
differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codec_names import SparseValues
from reft_edge.wire.codecs.indices import decode_indices, encode_indices, longest_index_bytes, usual_index_bytes
from reft_edge.wire.codecs.sparse_values import decode_values, encode_values, value_parts
from reft_edge.wire.codecs.tensor_codec import INDEX, Part

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, IntArray, Tensors


@dataclass(frozen=True, kw_only=True)
class TopKCodec:
    """`TensorCodec`."""

    fraction: float
    values: SparseValues
    cuts_vectors: bool = True

    def is_lossy(self, dtype: np.dtype[np.generic]) -> bool:  # noqa: ARG002
        return True

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        n = prod(shape)
        k = n_kept(self.fraction, n)
        index = Part(np.dtype(np.uint8), (longest_index_bytes(n),), longest=True, usual_bytes=usual_index_bytes(k, n))
        return {**value_parts(self.values, k), INDEX: index}

    def encode(self, array: FloatArray, rng: np.random.Generator | None) -> dict[str, Array]:  # noqa: ARG002
        flat = array.reshape(-1)
        chosen = largest(flat, n_kept(self.fraction, flat.size))
        return {**encode_values(flat[chosen], self.values, None), INDEX: encode_indices(chosen, flat.size)}

    def decode(self, parts: Tensors, shape: tuple[int, ...]) -> FloatArray:
        n = prod(shape)
        dense = np.zeros(n, np.float32)
        dense[decode_indices(parts[INDEX], n_kept(self.fraction, n), n)] = decode_values(parts, self.values)
        return dense.reshape(shape)


def n_kept(fraction: float, n: int) -> int:
    """k of `n` entries: at least one."""
    return min(n, ceil(fraction * n))


def largest(flat: FloatArray, k: int) -> IntArray:
    """The rising indices of the `k` entries of largest magnitude; of equals, the first."""
    if k == 0:
        return np.zeros(0, np.int64)
    sizes = np.abs(flat)
    threshold = np.partition(sizes, sizes.size - k)[sizes.size - k]
    above = np.flatnonzero(sizes > threshold)
    equal = np.flatnonzero(sizes == threshold)[: k - above.size]
    return np.sort(np.concatenate([above, equal]))
