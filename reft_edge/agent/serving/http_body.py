"""What a request's body holds: a picture, an array as .npy, or JSON. Checked before anything is made of it.

A body comes from anybody who reaches the port. Nothing in it is executed, unpickled or evaluated; arrays are as large
as the body at most, and pictures have a limit of their own, because few bytes can stand for many pixels.
"""

from __future__ import annotations

import io
import re
from math import prod
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from reft_edge.data.pictures import decode_picture
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from reft_edge.agent.serving.onnx_model import OnnxModel
    from reft_edge.types import Array

MAX_BODY_BYTES = 32 * 2**20
"""A picture of any camera; 54 samples of (3, 224, 224) in float32."""

MAX_JSON_BYTES = 4 * 2**20
"""Of JSON: each number of two bytes takes 32 in memory until it is in an array."""

MAX_SAMPLES = 10_000
MAX_ANSWERED = 1_000_000
"""Numbers that a model may answer to one request: they are Python's own for a moment, 32 bytes each."""

MAX_PIXELS = 25_000_000
"""A camera's; 75 MB while it is decoded."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP")
"""Of pictures; not TIFF, whose decoder is known for its holes and talks to standard error."""

_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_NPY_HEADER_BYTES = 1024

# The header is the text of a Python dictionary, which numpy evaluates; a pattern is enough for arrays of numbers.
_NPY_DTYPE = re.compile(rb"'descr': *'([<>|=]?[fiu][1248])'")
_NPY_ORDER = re.compile(rb"'fortran_order': *(True|False)")
_NPY_SHAPE = re.compile(rb"'shape': *\(([0-9]{0,18}(?:, ?[0-9]{1,18}){0,8}),?\)")


class UnknownBodyError(DataError):
    """A body of a kind that is not taken."""


class _JsonBody(msgspec.Struct):
    inputs: list[Any]


_json: msgspec.json.Decoder[_JsonBody] = msgspec.json.Decoder(_JsonBody)


def read_inputs(body: bytes, content_type: str, model: OnnxModel) -> Array | list[Any]:
    """Inputs for `OnnxModel.checked`. Raises `DataError`; `UnknownBodyError` says what could be sent."""
    inputs = _read(body, content_type, model)
    most = min(MAX_SAMPLES, max(1, MAX_ANSWERED // max(1, prod(model.output_shape))))
    n_samples = len(inputs) if isinstance(inputs, list) else len(np.atleast_1d(inputs))
    if n_samples > most:
        raise DataError(
            f"{n_samples} samples are more than {most}, which are answered at a time; send several requests"
        )
    return inputs


def _read(body: bytes, content_type: str, model: OnnxModel) -> Array | list[Any]:
    """What is sent is told by its first bytes: many clients name no type, or a wrong one."""
    if not body:
        raise DataError("the body is empty; send a picture, an array as .npy, or JSON")
    if content_type.startswith("multipart/"):
        raise UnknownBodyError("forms are not taken; send the file itself (curl --data-binary @FILE)")
    if body.startswith(_ZIP_MAGIC):
        raise UnknownBodyError("archives (.npz) are not taken; send one array as .npy")
    if body.startswith(_NPY_MAGIC):
        return _read_npy(body)
    if content_type.startswith("application/json") or body.lstrip()[:1] in (b"{", b"["):
        return _read_json(body)
    if not model.takes_pictures:
        raise UnknownBodyError(f'{model.expectation}; send an array as .npy, or JSON {{"inputs": [...]}}')
    picture = decode_picture(
        io.BytesIO(body), model.sample_shape, called="the body", formats=_FORMATS, max_pixels=MAX_PIXELS
    )
    return picture[None]


def _read_json(body: bytes) -> list[Any]:
    if len(body) > MAX_JSON_BYTES:
        raise DataError(f"{len(body)} bytes of JSON are more than {MAX_JSON_BYTES}; send an array as .npy")
    try:
        return _json.decode(body).inputs
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f'the body is not {{"inputs": [...]}}: {exc}') from exc


def _read_npy(body: bytes) -> Array:
    """An array that is a view of the body."""
    major = body[6] if len(body) > 12 else 0
    if major not in (1, 2):
        raise DataError("the body begins as .npy of a version that is not known; versions 1 and 2 are")
    start = 10 if major == 1 else 12
    header_bytes = int.from_bytes(body[8:start], "little")
    header = body[start : start + min(header_bytes, _MAX_NPY_HEADER_BYTES)]
    dtype, order, shape = (pattern.search(header) for pattern in (_NPY_DTYPE, _NPY_ORDER, _NPY_SHAPE))
    if dtype is None or order is None or shape is None:
        raise DataError("the body is .npy, but not of an array of numbers")
    kind = np.dtype(dtype[1].decode())
    sizes = tuple(int(size) for size in shape[1].split(b",") if size)
    found, wanted = len(body) - start - header_bytes, prod(sizes) * kind.itemsize
    if found != wanted:
        raise DataError(f"the body is .npy of shape {sizes} {kind.name}: {wanted} bytes, and has {max(0, found)}")
    values = np.frombuffer(body, kind, offset=start + header_bytes)
    return values.reshape(sizes, order="F" if order[1] == b"True" else "C")
