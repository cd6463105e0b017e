"""Tensors as they travel: float32, float16, or int8 with a scale for each channel, losslessly compressed on top.

`int8` stores q = round(x / s) with s = max|x| / 127 over each slice of the first axis (an output channel of a
convolution or linear layer), symmetric, so that zero stays zero and the error is at most s / 2 for each entry. It takes
a quarter of float32's bytes, and a little less after compression, because most of q is small.

What has fewer than two axes stays float32 under every codec: biases, norm weights and running statistics are below 1%
of a model's bytes, have no channel to share a scale with, and running variances span orders of magnitude. Integers and
booleans (counters) are never changed.

Uses numpy: for the worker and the coordinator, not for the agent's daemon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.bundle.container import container_limit, pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import TensorSpec
from reft_edge.errors import BundleError
from reft_edge.wire.messages import WeightsCodec

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

SCALE_SUFFIX = "::scale"
"""The container holds the float32 scales of tensor `name`, one for each slice of axis 0, as `name::scale`."""

_INT8_MAX = 127
"""-128 is not used: symmetric, so that negating an update negates its encoding."""

_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(_INT8_MAX), np.float32(0))
"""The largest float32 that stays finite times 127."""


def encode_tensors(tensors: Tensors, codec: WeightsCodec) -> bytes:
    """A container blob of `tensors` under `codec`.

    Raises `BundleError` for values that are not finite (training has diverged) and for names that look like scales.
    """
    stored: dict[str, Array] = {}
    for name, tensor in tensors.items():
        stored.update(_encode_checked(name, np.asarray(tensor), codec))
    return pack_tensors(stored, {"codec": codec})


def decode_tensors(data: bytes, codec: WeightsCodec, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The tensors in `data`: exactly `specs`, in their order, shapes and dtypes, with finite values.

    The size is bounded by what `specs` and `codec` need before anything is decompressed. Raises `BundleError`.
    """
    layout = {spec.name: _stored_as(spec, codec) for spec in specs}
    n_bytes = sum(prod(shape) * dtype.itemsize for parts in layout.values() for dtype, shape in parts.values())
    stored, metadata = unpack_tensors(data, max_bytes=container_limit(n_bytes))
    if metadata.get("codec") != codec:
        raise BundleError(f"tensors are encoded as {metadata.get('codec')!r}; {codec!r} was announced")
    expected = {name for parts in layout.values() for name in parts}
    if odd := sorted(expected ^ stored.keys()):
        side = "lack" if odd[0] in expected else "have unknown"
        raise BundleError(f"encoded tensors {side} {odd[0]!r} ({len(odd)} names differ)")
    tensors: dict[str, Array] = {}
    for spec in specs:
        for name, (dtype, shape) in layout[spec.name].items():
            found = stored[name]
            if found.dtype != dtype or found.shape != shape:
                raise BundleError(f"tensor {name!r} is {found.dtype} {found.shape}; expected {dtype} {shape}")
            _check_finite(name, found)
        tensors[spec.name] = _decode(spec, stored, codec)
    return tensors


class ErrorFeedback:
    """What a lossy codec left out of earlier updates is added to the next one.

    The sum of the decoded updates then stays within one rounding error of the sum of the true ones, however many rounds
    pass (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847, algorithm 2). Keep `residual` between rounds; it
    belongs to one variant of one run.
    """

    def __init__(self, codec: WeightsCodec, residual: Tensors | None = None) -> None:
        self._codec: WeightsCodec = codec
        self._residual: dict[str, Array] = dict(residual or {})

    @property
    def residual(self) -> dict[str, Array]:
        """float32 tensors, of those names whose encoding loses something."""
        return dict(self._residual)

    def encode(self, update: Tensors) -> bytes:
        """`update` plus the residual as a container blob; the residual becomes what that blob leaves out.

        A residual whose tensor is gone or has another shape is dropped. Raises `BundleError`, and keeps the residual,
        for values that are not finite.
        """
        stored: dict[str, Array] = {}
        residual: dict[str, Array] = {}
        for name, tensor in update.items():  # one tensor after another: a device holds few copies of a model
            array = self._corrected(name, np.asarray(tensor))
            parts = _encode_checked(name, array, self._codec)
            stored.update(parts)
            if _is_lossy(array.dtype, array.shape, self._codec):
                residual[name] = (array - _as_received(name, parts)).astype(np.float32, copy=False)
        self._residual = residual
        return pack_tensors(stored, {"codec": self._codec})

    def _corrected(self, name: str, tensor: Array) -> Array:
        residual = self._residual.get(name)
        if residual is None or residual.shape != tensor.shape or tensor.dtype.kind != "f":
            return tensor
        return (tensor + residual).astype(tensor.dtype)


def _is_lossy(dtype: np.dtype[np.generic], shape: tuple[int, ...], codec: WeightsCodec) -> bool:
    """Whether `codec` changes such a tensor's values."""
    if dtype.kind != "f" or len(shape) < 2 or codec == "float32":
        return False
    return codec == "int8" or dtype.itemsize > 2


def _stored_as(spec: TensorSpec, codec: WeightsCodec) -> Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    """Container entries of one tensor: name -> dtype and shape."""
    dtype = np.dtype(spec.dtype)
    if not _is_lossy(dtype, spec.shape, codec):
        return {spec.name: (dtype, spec.shape)}
    if codec == "float16":
        return {spec.name: (np.dtype(np.float16), spec.shape)}
    scales = (np.dtype(np.float32), (spec.shape[0],))
    return {spec.name: (np.dtype(np.int8), spec.shape), spec.name + SCALE_SUFFIX: scales}


def _encode_checked(name: str, array: Array, codec: WeightsCodec) -> dict[str, Array]:
    """Container entries of one tensor. Raises `BundleError`."""
    if name.endswith(SCALE_SUFFIX):
        raise BundleError(f"tensor {name!r}: names that end with {SCALE_SUFFIX!r} are reserved")
    _check_finite(name, array)
    return _encode(name, array, codec)


def _encode(name: str, array: Array, codec: WeightsCodec) -> dict[str, Array]:
    """Container entries of one tensor."""
    if not _is_lossy(array.dtype, array.shape, codec):
        return {name: array}
    if codec == "float16":
        limit = float(np.finfo(np.float16).max)
        return {name: np.clip(array, -limit, limit).astype(np.float16)}
    quantized, scales = _quantize(array)
    return {name: quantized, name + SCALE_SUFFIX: scales}


def _decode(spec: TensorSpec, stored: Tensors, codec: WeightsCodec) -> Array:
    """One tensor from its container entries, in the dtype of `spec`. Raises `BundleError`."""
    array = stored[spec.name]
    if codec == "int8" and _is_lossy(np.dtype(spec.dtype), spec.shape, codec):
        array = _dequantize(array, stored[spec.name + SCALE_SUFFIX])
    with np.errstate(over="ignore"):  # float16 is narrower than what int8 with scales can say
        decoded = array.astype(np.dtype(spec.dtype), copy=False)
    _check_finite(spec.name, decoded)
    return decoded


def _as_received(name: str, parts: Tensors) -> Array:
    """What the receiver will see of one tensor whose container entries are `parts`, float32."""
    if name + SCALE_SUFFIX in parts:
        return _dequantize(parts[name], parts[name + SCALE_SUFFIX])
    return parts[name].astype(np.float32)


def _quantize(array: Array) -> tuple[Array, FloatArray]:
    """int8 of the array's shape, and float32 scales (shape[0],)."""
    rows = array.reshape(array.shape[0], prod(array.shape[1:])).astype(np.float32, copy=False)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    scales = (largest / np.float32(_INT8_MAX)).astype(np.float32)
    # Rounding up must not make 127 * scale overflow, and a scale below the normal numbers has no precision: call it 0.
    scales = np.minimum(scales, _MAX_SCALE)
    scales[scales < np.finfo(np.float32).tiny] = 0.0
    divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
    rounded = np.clip(np.rint(rows / divisors), -_INT8_MAX, _INT8_MAX)
    return rounded.astype(np.int8).reshape(array.shape), scales


def _dequantize(quantized: Array, scales: Array) -> FloatArray:
    """Inverse of `_quantize`, up to half a scale for each entry. float32, the shape of `quantized`."""
    with np.errstate(over="ignore"):  # infinities are looked for afterwards, and refused
        result: FloatArray = quantized.astype(np.float32)
        result *= scales.reshape(-1, *[1] * (quantized.ndim - 1))
    return result


def _check_finite(name: str, array: Array) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BundleError(f"tensor {name!r} has values that are not finite; the training has diverged")
