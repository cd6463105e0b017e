"""A model's tensors to a container blob and back, whatever the codec.

What has fewer than two axes stays as it is under every codec: biases, norm weights and running statistics are below 1%
of a model's bytes, have no channel to share a scale with, and running variances span orders of magnitude. Integers and
booleans (counters) are never changed. float16 tensors are encoded as float32 would be, and come back as float16.

Tensors are encoded one after another: beside the tensors that it is given, encoding holds what is already encoded and a
few copies of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from reft_edge.bundle.container import container_limit, pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import TensorSpec
from reft_edge.errors import BundleError
from reft_edge.wire.codec_names import Codec, codec_text
from reft_edge.wire.codecs.registry import implementation
from reft_edge.wire.codecs.tensor_codec import SUFFIXES, VALUES, Part, TensorCodec

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

    OnEncoded: TypeAlias = Callable[[str, FloatArray, FloatArray], None]
    """Called with a tensor's name, its values and what the receiver will see of them, both float32."""

MIN_AXES = 2
"""Tensors of fewer axes are not encoded."""


def encode_tensors(
    tensors: Tensors, codec: Codec, *, rng: np.random.Generator | None = None, on_encoded: OnEncoded | None = None
) -> bytes:
    """A container blob of `tensors` under `codec`.

    `rng` is for codecs that draw random numbers; the same state gives the same bytes. `on_encoded` hears, of each
    tensor that is not carried exactly, what was lost. `tensors` may compute its values when asked; it is asked once
    for each, or twice by codecs that look at the whole model first.

    Raises `BundleError` for values that are not finite (training has diverged) and for names that look like parts.
    """
    code = implementation(codec)
    if code.draws and rng is None:
        raise ValueError(f"codec {codec_text(codec)!r} draws random numbers and was given no generator")
    choice = code.choose(_lossy(tensors, code.decoder))
    stored: dict[str, Array] = {}
    for name in tensors:
        array = np.asarray(tensors[name])
        _check_name(name)
        _check_finite(name, array)
        if not _is_lossy(array.dtype, array.shape, code.decoder):
            stored[name] = array
            continue
        values, tensor_codec = array.astype(np.float32, copy=False), choice(name)
        parts = tensor_codec.encode(values, rng)
        stored.update((name + suffix, part) for suffix, part in parts.items())
        if on_encoded is not None:
            on_encoded(name, values, code.decoder.decode(parts, array.shape))
    return pack_tensors(stored, {"codec": codec_text(codec)})


def decode_tensors(data: bytes, codec: Codec, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The tensors in `data`: exactly `specs`, in their order, shapes and dtypes, with finite values.

    The size is bounded by what `specs` and `codec` need before anything is decompressed. Raises `BundleError`.
    """
    decoder = implementation(codec).decoder
    layout = {spec.name: parts_of(spec, decoder) for spec in specs}
    n_bytes = sum(part.n_bytes for parts in layout.values() for part in parts.values())
    stored, metadata = unpack_tensors(data, max_bytes=container_limit(n_bytes))
    if metadata.get("codec") != codec_text(codec):
        raise BundleError(f"tensors are encoded as {metadata.get('codec')!r}; {codec_text(codec)!r} was announced")
    expected = {name + suffix for name, parts in layout.items() for suffix in parts}
    if odd := sorted(expected ^ stored.keys()):
        side = "lack" if odd[0] in expected else "have unknown"
        raise BundleError(f"encoded tensors {side} {odd[0]!r} ({len(odd)} names differ)")
    tensors: dict[str, Array] = {}
    for spec in specs:
        parts = {suffix: stored.pop(spec.name + suffix) for suffix in layout[spec.name]}
        tensors[spec.name] = _decode(spec, parts, layout[spec.name], decoder)
    return tensors


def _decode(spec: TensorSpec, parts: Tensors, expected: Mapping[str, Part], decoder: TensorCodec) -> Array:
    """One tensor from its container entries, in the dtype of `spec`. Raises `BundleError`."""
    for suffix, part in expected.items():
        found, name = parts[suffix], spec.name + suffix
        if not part.admits(found):
            most = "at most " if part.longest else ""
            raise BundleError(
                f"tensor {name!r} is {found.dtype} {found.shape}; expected {most}{part.dtype} {part.shape}"
            )
        _check_finite(name, found)
    dtype = np.dtype(spec.dtype)
    if not _is_lossy(dtype, spec.shape, decoder):
        return parts[VALUES]
    with np.errstate(over="ignore"):  # float16 is narrower than what int8 with scales can say
        decoded: Array = decoder.decode(parts, spec.shape).astype(dtype, copy=False)
    _check_finite(spec.name, decoded)
    return decoded


def parts_of(spec: TensorSpec, decoder: TensorCodec) -> Mapping[str, Part]:
    """Container entries of one tensor, by suffix."""
    dtype = np.dtype(spec.dtype)
    return decoder.parts(spec.shape) if _is_lossy(dtype, spec.shape, decoder) else {VALUES: Part(dtype, spec.shape)}


def _lossy(tensors: Tensors, decoder: TensorCodec) -> Iterator[tuple[str, FloatArray]]:
    """The tensors that the codec will change, as float32."""
    for name in tensors:
        array = np.asarray(tensors[name])
        if _is_lossy(array.dtype, array.shape, decoder):
            _check_finite(name, array)
            yield name, array.astype(np.float32, copy=False)


def _is_lossy(dtype: np.dtype[np.generic], shape: tuple[int, ...], codec: TensorCodec) -> bool:
    return dtype.kind == "f" and len(shape) >= MIN_AXES and codec.is_lossy(dtype)


def _check_name(name: str) -> None:
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            raise BundleError(f"tensor {name!r}: names that end with {suffix!r} are reserved")


def _check_finite(name: str, array: Array) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BundleError(f"tensor {name!r} has values that are not finite; the training has diverged")
