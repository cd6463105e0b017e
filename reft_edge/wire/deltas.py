"""New weights as what they differ in from those that the receiver has: the way down from the second round on.

With b the weights that a device trained from last, x those that it should get, C the delta codec and E the codec of
whole weights, C(x - b) travels, and both sides go on with

    w = E(b + C(x - b)),

the content of the whole blob as well. So a device gets the same numbers whichever of the two blobs it fetches, and the
coordinator knows them. What w lacks of x stays in the next difference: error feedback on the server's side (EF21-P:
Gruntkowska, Tyurin, Richtarik, arXiv 2209.15218, algorithm 1). After a kill the same b and x give the same bytes.

`rebuild` is the one place where w is computed. Its arithmetic is exact by IEEE 754 on every platform, and a digest over
the values tells where it was not.

Uses numpy: for the worker and the coordinator, not for the agent's daemon.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import BundleError
from reft_edge.wire.codecs import decode_tensors, encode_tensors, weight_norms
from reft_edge.wire.compensation.derived import Derived

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import TensorSpec
    from reft_edge.types import Array, Tensors
    from reft_edge.wire.codec_names import Codec


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights as a device trains from them, and the whole blob that holds them."""

    blob: bytes
    tensors: dict[str, Array]


def encode_delta(wanted: Tensors, base: Tensors, codec: Codec) -> bytes:
    """The blob that leads from `base` to (nearly) `wanted`; both have the same names, shapes and dtypes.

    The same tensors give the same bytes, also where the codec draws random numbers. Raises `BundleError` when the
    difference is not finite.
    """
    with np.errstate(over="ignore"):  # infinities are found, and refused, when they are encoded
        seed = _seed(values_digest(wanted))
        difference = Derived(wanted, lambda name, tensor: _difference(tensor, base[name]))
        return encode_tensors(difference, codec, rng=np.random.default_rng(seed), norms=weight_norms(base))


def rebuild(
    base: dict[str, Array], delta: bytes, *, delta_codec: Codec, weights_codec: Codec, specs: Sequence[TensorSpec]
) -> Weights:
    """w of the module's formula. `base` is emptied: a device holds few copies of a model.

    Raises `BundleError` for a delta that does not fit, or leads to values that are not finite.
    """
    changes = decode_tensors(delta, delta_codec, specs)
    with np.errstate(over="ignore"):
        wanted = {spec.name: _sum(base.pop(spec.name), changes.pop(spec.name)) for spec in specs}
    rng = np.random.default_rng(_seed(hashlib.sha256(delta).hexdigest()))
    blob = encode_tensors(wanted, weights_codec, rng=rng)
    wanted.clear()
    return Weights(blob=blob, tensors=decode_tensors(blob, weights_codec, specs))


def values_digest(tensors: Tensors) -> str:
    """SHA-256 over names, shapes, dtypes and values, however they were encoded and compressed."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        little = array.dtype.newbyteorder("<")
        digest.update(f"{name}\0{little.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array, dtype=little).data)
    return digest.hexdigest()


def check_values(tensors: Tensors, digest: str) -> None:
    """Raise `BundleError` unless these are the values that the coordinator has computed."""
    if values_digest(tensors) != digest:
        raise BundleError("what base and delta give is not what the coordinator has")


def _difference(wanted: Array, base: Array) -> Array:
    """What `_sum` adds to `base`. Integers wrap around; of truth values it is where they differ."""
    if wanted.dtype == np.bool_:
        return np.logical_xor(wanted, base)
    difference: Array = wanted - base
    return difference


def _sum(base: Array, change: Array) -> Array:
    if base.dtype == np.bool_:
        return np.logical_xor(base, change)
    total: Array = base + change
    return total


def _seed(digest: str) -> int:
    """128 bits of a digest, for a generator that both sides can make."""
    return int(digest[:32], 16)
