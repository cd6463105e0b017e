"""Codecs: how much they lose, what error feedback gives back, and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.bundle.container import compress, pack_tensors
from reft_edge.bundle.manifest import TensorSpec
from reft_edge.errors import BundleError
from reft_edge.wire.codec_names import Codec, Float16, Float32, Int8, codec_text
from reft_edge.wire.codecs import decode_tensors, encode_tensors
from reft_edge.wire.compensation.error_feedback import ErrorFeedback

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors

CODECS: tuple[Codec, ...] = (Float32(), Float16(), Int8())


def specs_of(tensors: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=a.shape, dtype=a.dtype.name) for name, a in tensors.items()]  # type: ignore[arg-type]


def float_arrays(width: int = 32) -> st.SearchStrategy[Array]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    elements = st.floats(allow_nan=False, allow_infinity=False, width=width)  # type: ignore[arg-type]
    return hnp.arrays(np.dtype(f"float{width}"), shapes, elements=elements)


@settings(max_examples=150, deadline=None)
@given(array=st.one_of(float_arrays(32), float_arrays(16)), codec=st.sampled_from(CODECS))
def test_the_error_of_each_entry_is_within_the_codecs_bound(array: Array, codec: Codec) -> None:
    tensors = {"w": array}
    decoded = decode_tensors(encode_tensors(tensors, codec), codec, specs_of(tensors))["w"]
    assert decoded.dtype == array.dtype
    assert decoded.shape == array.shape
    if codec == Float32() or array.ndim < 2:
        np.testing.assert_array_equal(decoded, array)
        return
    exact, found = array.astype(np.float64), decoded.astype(np.float64)
    if codec == Float16():
        bound = np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25)
        bound[np.abs(exact) > 65504] = np.inf
    else:
        largest = np.abs(exact).max(axis=tuple(range(1, array.ndim)), initial=0.0, keepdims=True)
        bound = largest / 254 * (1 + 1e-5) + 127 * np.finfo(np.float32).tiny
    if array.dtype == np.float16:
        bound = bound + np.abs(exact) * 2.0**-10 + 2.0**-24
    assert (np.abs(found - exact) <= bound).all()


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(hnp.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)), min_size=1, max_size=12),
    codec=st.sampled_from(CODECS),
)
def test_error_feedback_keeps_the_sum_of_updates(rounds: list[Array], codec: Codec) -> None:
    sent = np.zeros((3, 4))
    residual: dict[str, Array] = {}
    for update in rounds:
        feedback = ErrorFeedback(codec, residual)  # a new object each round, as in a new worker process
        data = feedback.encode({"w": update})
        residual = feedback.state
        sent += decode_tensors(data, codec, [TensorSpec(name="w", shape=(3, 4))])["w"]
    true = np.sum(rounds, axis=0, dtype=np.float64)
    np.testing.assert_allclose(sent + residual.get("w", 0.0), true, atol=1e-3)
    assert np.abs(residual.get("w", np.zeros(1))).max() <= 0.5 * 200 / 127


def test_small_updates_get_through_int8_with_feedback_and_are_lost_without() -> None:
    update = {"w": np.array([[1.0, 0.001]], np.float32)}
    specs = specs_of(update)
    feedback = ErrorFeedback(Int8())
    with_feedback = sum(decode_tensors(feedback.encode(update), Int8(), specs)["w"][0, 1] for _ in range(100))
    without = sum(decode_tensors(encode_tensors(update, Int8()), Int8(), specs)["w"][0, 1] for _ in range(100))
    assert without == 0.0
    assert with_feedback == pytest.approx(0.1, abs=0.005)


def test_a_residual_of_another_shape_is_dropped() -> None:
    feedback = ErrorFeedback(Int8(), {"w": np.ones((5, 5), np.float32), "gone": np.ones((2, 2), np.float32)})
    feedback.encode({"w": np.zeros((2, 3), np.float32), "n": np.array(3)})
    assert {name: array.shape for name, array in feedback.state.items()} == {"w": (2, 3)}


@pytest.mark.parametrize("codec", CODECS, ids=codec_text)
def test_vectors_scalars_and_integers_are_never_changed(codec: Codec) -> None:
    tensors: dict[str, Array] = {
        "bias": np.array([1e-30, 1e30, 3.14159274], np.float32),
        "variance": np.float32(1e-12) * np.ones((), np.float32),
        "batches": np.array(2**62),
        "mask": np.array([[True, False]]),
        "ids": np.array([[1, -(2**31)]], np.int32),
    }
    decoded = decode_tensors(encode_tensors(tensors, codec), codec, specs_of(tensors))
    assert list(decoded) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(decoded[name], array, strict=True)


@pytest.mark.parametrize("value", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45])
def test_the_ends_of_float32_survive_int8(value: float) -> None:
    tensors = {"w": np.array([[value, -value, 0]], np.float32)}
    decoded = decode_tensors(encode_tensors(tensors, Int8()), Int8(), specs_of(tensors))["w"]
    np.testing.assert_allclose(decoded, tensors["w"], rtol=1e-5, atol=127 * np.finfo(np.float32).tiny)


def test_int8_takes_about_a_quarter_of_float32() -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(64, 576)).astype(np.float32)}
    sizes = {codec: len(encode_tensors(weights, codec)) for codec in CODECS}
    assert sizes[Int8()] < 0.26 * sizes[Float32()]
    assert sizes[Float16()] < 0.55 * sizes[Float32()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", CODECS, ids=codec_text)
def test_values_that_are_not_finite_are_refused_at_both_ends(codec: Codec, value: float) -> None:
    tensors = {"w": np.ones((2, 2), np.float32)}
    tensors["w"][1, 1] = value
    with pytest.raises(BundleError, match="not finite"):
        encode_tensors(tensors, codec)
    stored: dict[str, Array] = {"w": tensors["w"]}
    if codec == Float16():
        stored = {"w": tensors["w"].astype(np.float16)}
    elif codec == Int8():
        stored = {"w": np.ones((2, 2), np.int8), "w::scale": np.array([1, value], np.float32)}
    with pytest.raises(BundleError, match="not finite"):
        decode_tensors(pack_tensors(stored, {"codec": codec_text(codec)}), codec, specs_of(tensors))


ENCODED = encode_tensors({"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}, Int8())
SPECS = [TensorSpec(name="w", shape=(2, 3)), TensorSpec(name="b", shape=(2,))]


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"w": np.ones((2, 3), np.int8), "b": np.ones(2, np.float32)},
        {"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)},
        {"w": np.ones((3, 2), np.int8), "w::scale": np.ones(2, np.float32), "b": np.ones(2, np.float32)},
        {"w": np.ones((2, 3), np.int8), "w::scale": np.ones(3, np.float32), "b": np.ones(2, np.float32)},
        {"w": np.ones((2, 3), np.int8), "w::scale": np.ones(2, np.float32), "b": np.ones(2, np.int64)},
        {"w": np.full((2, 3), 127, np.int8), "w::scale": np.full(2, 3e38, np.float32), "b": np.ones(2, np.float32)},
        {
            "w": np.ones((2, 3), np.int8),
            "w::scale": np.ones(2, np.float32),
            "b": np.ones(2, np.float32),
            "x": np.ones(1),
        },
        {"w": np.zeros((2**23, 3), np.int8), "w::scale": np.ones(2, np.float32), "b": np.ones(2, np.float32)},
    ],
)
def test_containers_that_are_not_what_was_announced_are_refused(stored: dict[str, Array]) -> None:
    stored = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in stored.items()}
    with pytest.raises(BundleError):
        decode_tensors(pack_tensors(stored, {"codec": "int8"}), Int8(), SPECS)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_bytes_raise_bundle_error_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(ENCODED)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for payload in (cut, bytes(damaged), data.draw(st.binary(max_size=64))):
        try:
            decoded = decode_tensors(payload, Int8(), SPECS)
        except BundleError:
            continue
        assert {name: array.shape for name, array in decoded.items()} == {"w": (2, 3), "b": (2,)}


def test_a_deeply_nested_header_is_refused() -> None:
    header = b'{"a":' * 20_000
    with pytest.raises(BundleError, match="malformed"):
        decode_tensors(compress(len(header).to_bytes(8, "little") + header), Int8(), SPECS)


def test_another_codec_than_announced_is_refused() -> None:
    with pytest.raises(BundleError, match="announced"):
        decode_tensors(ENCODED, Float32(), SPECS)


def test_names_that_could_be_taken_for_scales_are_refused() -> None:
    with pytest.raises(BundleError, match="reserved"):
        encode_tensors({"w::scale": np.ones(2, np.float32)}, Int8())
