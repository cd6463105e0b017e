"""Tensors on the wire and on disk: the safetensors layout inside one zstandard frame.

The layout is eight bytes of little-endian header length, a JSON header, and the raw tensors one after another. It is
written and read here rather than by the safetensors package for three reasons: equal tensors give equal bytes
(the package writes metadata in the order of a hash map), tensors are views of one buffer instead of copies (a Pi Zero
has 512 MB), and every number in the header is checked before it is used. Other tools can open the decompressed file.

A container holds numbers only: nothing in it is code and nothing is executed on reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import zstandard

from reft_edge.bundle.manifest import MAX_TENSORS, is_possible_shape
from reft_edge.errors import BundleError

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors

MAX_HEADER_BYTES = 4 * 2**20
"""4 MiB: about 40,000 tensors. The header is parsed whole, so its size must not be the sender's choice."""

_ALIGNMENT = 64
"""Data start at a multiple of a cache line, so that arrays over the buffer are aligned for every dtype."""

_WEIGHTS_LEVEL = 3
"""Floats barely compress: higher zstandard levels cost seconds and gain under 1%."""

_DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I8": np.dtype("<i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("<u1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_OUT_OF_MEMORY = "allocation error"
"""In zstandard's message when its own memory cannot be had; the frame is not to blame then."""


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in the header: dtype code, shape, and first and last byte within the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def compress(data: bytes, *, level: int = _WEIGHTS_LEVEL) -> bytes:
    """One zstandard frame that states its content's size. Equal input gives equal output. Raises `MemoryError`."""
    try:
        return zstandard.ZstdCompressor(level=level).compress(data)
    except zstandard.ZstdError as exc:  # nothing else can go wrong; the library does not raise what Python would
        raise MemoryError(str(exc)) from exc


def decompress(data: bytes, *, max_bytes: int) -> bytes:
    """Inverse of `compress`.

    The frame's stated size is compared with `max_bytes` before anything is allocated. Raises `BundleError`, and
    `MemoryError` for a sound frame that this process has no room for.
    """
    try:
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError as exc:
        raise BundleError(f"{len(data)} bytes are not a zstandard frame: {exc}") from exc
    if not 0 <= size <= max_bytes:
        claim = "does not state its size" if size < 0 else f"claims {size} bytes"
        raise BundleError(f"compressed data {claim}; at most {max_bytes} bytes are accepted")
    try:
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        if _OUT_OF_MEMORY in str(exc).lower():
            raise MemoryError(str(exc)) from exc
        raise BundleError(f"compressed data are damaged: {exc}") from exc
    if len(content) != size:
        raise BundleError(f"compressed data claim {size} bytes and hold {len(content)}")
    return content


def pack_tensors(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Compressed container of `tensors`, in sorted order of their names.

    Raises `BundleError` for a dtype that containers do not carry.
    """
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    chunks: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _CODES:
            raise BundleError(f"tensor {name!r} has dtype {array.dtype}; containers carry {', '.join(_DTYPES)}")
        data = array.astype(dtype, copy=False).tobytes()
        header[name] = _Entry(_CODES[dtype], array.shape, (offset, offset + len(data)))
        chunks.append(data)
        offset += len(data)
    text = msgspec.json.encode(header)
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return compress(b"".join([len(text).to_bytes(8, "little"), text, *chunks]))


def unpack_tensors(data: bytes, *, max_bytes: int) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a container; the arrays are read-only views of one buffer.

    `max_bytes` bounds the decompressed container (see `container_limit`). Raises `BundleError`.
    """
    content = decompress(data, max_bytes=max_bytes)
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(content):
        raise BundleError(f"tensor container of {len(content)} bytes has an impossible header of {length} bytes")
    try:
        header = msgspec.json.decode(content[8 : 8 + length], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BundleError(f"tensor container has a malformed header: {exc}") from exc
    if len(entries) > MAX_TENSORS:
        raise BundleError(f"tensor container has {len(entries)} tensors; at most {MAX_TENSORS} are accepted")
    start = 8 + length
    tensors: dict[str, Array] = {}
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        expected = _check_entry(name, entry, expected)
        if start + expected > len(content):
            raise BundleError(f"tensor {name!r} ends beyond its container")
        offset = start + entry.data_offsets[0]
        flat = np.frombuffer(content, _DTYPES[entry.dtype], count=prod(entry.shape), offset=offset)
        if flat.dtype == np.bool_ and flat.view(np.uint8).max(initial=0) > 1:
            raise BundleError(f"tensor {name!r} has truth values that are neither 0 nor 1")
        tensors[name] = flat.reshape(entry.shape)
    if start + expected != len(content):
        raise BundleError(f"tensor container has {len(content) - start - expected} bytes that belong to no tensor")
    return tensors, metadata


def container_limit(content_bytes: int) -> int:
    """`max_bytes` for a container whose tensors should take `content_bytes`."""
    return 8 + MAX_HEADER_BYTES + content_bytes


def _check_entry(name: str, entry: _Entry, expected_start: int) -> int:
    """Check one tensor of a header; return where it ends. Tensors follow each other without gap or overlap."""
    if entry.dtype not in _DTYPES:
        raise BundleError(f"tensor {name!r} has dtype {entry.dtype!r}; containers carry {', '.join(_DTYPES)}")
    if not is_possible_shape(entry.shape):
        raise BundleError(f"tensor {name!r} has an impossible shape {entry.shape!r}")
    start, end = entry.data_offsets
    if start != expected_start or end - start != prod(entry.shape) * _DTYPES[entry.dtype].itemsize:
        raise BundleError(f"tensor {name!r} of shape {entry.shape!r} cannot lie at bytes {start} to {end}")
    return end
