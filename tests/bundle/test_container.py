from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reft_edge.bundle.container import compress, decompress, pack_tensors, unpack_tensors
from reft_edge.errors import BundleError

DTYPES = ["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
ARRAYS = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))
LIMIT = 1 << 24


def container(header: bytes, data: bytes = b"") -> bytes:
    return compress(len(header).to_bytes(8, "little") + header + data)


@given(st.dictionaries(st.text(min_size=1), ARRAYS, max_size=4), st.dictionaries(st.text(), st.text(), max_size=3))
def test_what_was_packed_comes_back_bit_for_bit(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    tensors.pop("__metadata__", None)
    found, notes = unpack_tensors(pack_tensors(tensors, metadata), max_bytes=LIMIT)
    assert notes == metadata
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_equal_tensors_give_equal_bytes_in_any_order() -> None:
    a, b = np.arange(6.0, dtype="f4").reshape(2, 3), np.array(7, dtype="i8")
    first = pack_tensors({"a": a, "b": b}, {"x": "1", "y": "2"})
    assert first == pack_tensors({"b": b, "a": np.asfortranarray(a)}, {"y": "2", "x": "1"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"garbage", "not a zstandard frame"),
        (compress(b"x" * 100)[:-4], "damaged"),
        (compress(b"x" * 100) + b"more", "damaged"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(b"x"), "does not state its size"),
        (compress(bytes(LIMIT + 1)), "at most"),
        (compress(b"abc"), "impossible header"),
        (compress((1 << 62).to_bytes(8, "little")), "impossible header"),
        (container(b"[1]"), "malformed header"),
        (container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234"), "ends beyond"),
        (container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234"), "cannot lie"),
        (container(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678"), "cannot lie"),
        (container(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"), "impossible shape"),
        (container(b'{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', b"12345678"), "dtype"),
        (container(b"{}", b"stowaway"), "no tensor"),
    ],
)
def test_what_is_not_a_container_is_refused_with_a_reason(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        unpack_tensors(data, max_bytes=LIMIT)


def test_a_bomb_is_refused_before_it_is_decompressed() -> None:
    with pytest.raises(BundleError, match="claims 1073741824 bytes"):
        decompress(compress(bytes(1 << 30), level=1), max_bytes=1000)
