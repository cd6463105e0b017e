"""A model's tensors to a container blob and back, whatever the codec.

What has fewer than two axes is not quantized: biases, norm weights and running statistics have no channel to share a
scale with, and running variances span orders of magnitude. It stays as it is, or, beside codecs so coarse that it would
weigh, loses half of its mantissa (`vectors`). Integers and booleans (counters) are never changed. float16 tensors are
encoded as float32 would be, and come back as float16.

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
from reft_edge.wire.codecs.tensor_codec import SUFFIXES, VALUES, Part, TensorCodec, row_norms
from reft_edge.wire.codecs.vectors import cut_vector, read_vector, vector_part

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

    OnEncoded: TypeAlias = Callable[[str, FloatArray, FloatArray], None]
    """Called with a tensor's name, its values and what the receiver will see of them, both float32."""

MIN_AXES = 2
"""Tensors of fewer axes are not quantized."""


def encode_tensors(
    tensors: Tensors,
    codec: Codec,
    *,
    rng: np.random.Generator | None = None,
    norms: Mapping[str, FloatArray] | None = None,
    on_encoded: OnEncoded | None = None,
) -> bytes:
    """A container blob of `tensors` under `codec`.

    `rng` is for codecs that draw random numbers; the same state gives the same bytes. `norms` (`weight_norms`) is for
    those that compare an update with the weights that it changes. `on_encoded` hears, of each tensor of two axes or
    more that is not carried exactly, what was lost. `tensors` may compute its values when asked; it is asked once for
    each, or twice by codecs that look at the whole model first.

    Raises `BundleError` for values that are not finite (training has diverged) and for names that look like parts.
    """
    code = implementation(codec)
    if code.draws and rng is None:
        raise ValueError(f"codec {codec_text(codec)!r} draws random numbers and was given no generator")
    if code.compares and norms is None:
        raise ValueError(f"codec {codec_text(codec)!r} compares with weights and was given no norms")
    choice = code.choose(_lossy(tensors, code.decoder), norms or {})
    stored: dict[str, Array] = {}
    for name in tensors:
        array = np.asarray(tensors[name])
        _check_name(name)
        _check_finite(name, array)
        if not _is_lossy(array.dtype, array.shape, code.decoder):
            stored[name] = cut_vector(array) if _is_cut(array.dtype, array.shape, code.decoder) else array
            continue
        values, tensor_codec = array.astype(np.float32, copy=False), choice(name)
        parts = tensor_codec.encode(values, rng)
        stored.update((name + suffix, part) for suffix, part in parts.items())
        if on_encoded is not None:
            received = code.decoder.decode(parts, array.shape).astype(array.dtype, copy=False)
            on_encoded(name, values, received.astype(np.float32, copy=False))
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
    if _is_cut(dtype, spec.shape, decoder):
        decoded: Array = read_vector(parts[VALUES], spec.shape)
    elif not _is_lossy(dtype, spec.shape, decoder):
        return parts[VALUES]
    else:
        with np.errstate(over="ignore"):  # float16 is narrower than what int8 with scales can say
            decoded = decoder.decode(parts, spec.shape).astype(dtype, copy=False)
    _check_finite(spec.name, decoded)
    return decoded


def parts_of(spec: TensorSpec, decoder: TensorCodec) -> Mapping[str, Part]:
    """Container entries of one tensor, by suffix."""
    dtype = np.dtype(spec.dtype)
    if _is_lossy(dtype, spec.shape, decoder):
        return decoder.parts(spec.shape)
    return {VALUES: vector_part(spec.n_elements) if _is_cut(dtype, spec.shape, decoder) else Part(dtype, spec.shape)}


def compensated(specs: Sequence[TensorSpec], codec: Codec) -> list[TensorSpec]:
    """Of which tensors `codec` leaves out something that `on_encoded` hears of, and a compensation may keep."""
    decoder = implementation(codec).decoder
    return [spec for spec in specs if _is_lossy(np.dtype(spec.dtype), spec.shape, decoder)]


def lossy_names(tensors: Tensors, codec: Codec) -> list[str]:
    """The same for tensors that are there."""
    decoder = implementation(codec).decoder
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    return [name for name, array in arrays.items() if _is_lossy(array.dtype, array.shape, decoder)]


def weight_norms(tensors: Tensors) -> dict[str, FloatArray]:
    """`norms` for `encode_tensors`: of the weights that an update changes, by channel."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    return {
        name: row_norms(array) for name, array in arrays.items() if array.dtype.kind == "f" and array.ndim >= MIN_AXES
    }


def _lossy(tensors: Tensors, decoder: TensorCodec) -> Iterator[tuple[str, FloatArray]]:
    """The tensors that the codec will change, as float32."""
    for name in tensors:
        array = np.asarray(tensors[name])
        if _is_lossy(array.dtype, array.shape, decoder):
            _check_finite(name, array)
            yield name, array.astype(np.float32, copy=False)


def _is_lossy(dtype: np.dtype[np.generic], shape: tuple[int, ...], codec: TensorCodec) -> bool:
    return dtype.kind == "f" and len(shape) >= MIN_AXES and codec.is_lossy(dtype)


def _is_cut(dtype: np.dtype[np.generic], shape: tuple[int, ...], codec: TensorCodec) -> bool:
    return dtype == np.float32 and len(shape) < MIN_AXES and codec.cuts_vectors


def _check_name(name: str) -> None:
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            raise BundleError(f"tensor {name!r}: names that end with {suffix!r} are reserved")


def _check_finite(name: str, array: Array) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BundleError(f"tensor {name!r} has values that are not finite; the training has diverged")
