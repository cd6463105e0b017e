"""Coarse codecs: what they promise about bias, contraction and bytes, and what their decoders refuse."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.bundle.container import compress, decompress, pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import TensorSpec
from reft_edge.errors import BundleError
from reft_edge.wire.codec_names import (
    Codec,
    Int4,
    Int8,
    LayerWise,
    RandomK,
    Selective,
    TopK,
    codec_text,
)
from reft_edge.wire.codecs import decode_tensors, encode_tensors, encoded_bytes, weight_norms
from reft_edge.wire.codecs.bit_planes import pack_planes, unpack_planes
from reft_edge.wire.codecs.indices import decode_indices, encode_indices
from reft_edge.wire.codecs.int4 import pack_halves, unpack_halves
from reft_edge.wire.codecs.layer_wise import Candidate, allocate
from reft_edge.wire.codecs.random_k import BLOCK, drawn
from reft_edge.wire.codecs.registry import implementation
from reft_edge.wire.codecs.tensors import parts_of
from reft_edge.wire.codecs.top_k import largest

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors

COARSE: tuple[Codec, ...] = (
    Int4(),
    Int4(stochastic=True),
    TopK(fraction=0.2),
    TopK(fraction=0.2, values="float32"),
    RandomK(fraction=0.3),
    RandomK(fraction=0.3, unbiased=True, values="float32"),
    LayerWise(error_budget=0.4),
    Selective(threshold=0.5),
)
UNBIASED: tuple[Codec, ...] = (
    Int8(stochastic=True),
    Int4(stochastic=True),
    RandomK(fraction=0.3, unbiased=True),
    RandomK(fraction=0.3, unbiased=True, values="float32"),
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def specs_of(tensors: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=a.shape, dtype=a.dtype.name) for name, a in tensors.items()]  # type: ignore[arg-type]


def encoded(tensors: Tensors, codec: Codec, *, seed: int = 0, weights: Tensors | None = None) -> bytes:
    norms = weight_norms(weights or {name: np.ones_like(tensor) for name, tensor in tensors.items()})
    return encode_tensors(tensors, codec, rng=rng(seed), norms=norms)


def passed(tensors: Tensors, codec: Codec, *, seed: int = 0) -> dict[str, Array]:
    """What the receiver sees."""
    return decode_tensors(encoded(tensors, codec, seed=seed), codec, specs_of(tensors))


def matrices(largest: float = 1e6) -> st.SearchStrategy[Array]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=5)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-largest, largest, width=32))


def squared(array: Array) -> float:
    return float(np.square(array.astype(np.float64)).sum())


def delta(codec: Codec, shape: tuple[int, ...]) -> float:
    """The contraction factor that the codec's file states for a tensor of this shape."""
    n, row = int(np.prod(shape)), int(np.prod(shape[1:]))
    match codec:
        case Int8() | Int4():
            levels = 127 if isinstance(codec, Int8) else 7
            return max(1 / row, 1 - row / (4 * levels**2))
        case TopK(fraction=fraction, values=values):
            k = int(np.ceil(fraction * n))
            return k / n * (1.0 if values == "float32" else max(1 / k, 1 - k / (4 * 127**2)))
        case LayerWise(error_budget=budget):
            return 1 - budget**2
    return 0.0


@settings(max_examples=150, deadline=None)
@given(
    array=matrices(),
    codec=st.sampled_from(
        (
            Int8(),
            Int4(),
            TopK(fraction=0.2),
            TopK(fraction=0.2, values="float32"),
            RandomK(fraction=0.3),
            LayerWise(error_budget=0.4),
            LayerWise(error_budget=0.05),
            Selective(threshold=0.5),
        )
    ),
)
def test_contractions_contract_by_the_factor_that_they_state(array: Array, codec: Codec) -> None:
    error = squared(passed({"w": array}, codec)["w"] - array.astype(np.float64))
    factor = delta(codec, array.shape) if array.size else 0.0
    assert error <= (1 - factor) * squared(array) * (1 + 1e-5) + array.size * 1e-70


@pytest.mark.parametrize("codec", UNBIASED, ids=codec_text)
def test_the_expectation_of_unbiased_codecs_is_the_tensor(codec: Codec) -> None:
    tensor = rng(1).normal(size=(3, 20)).astype(np.float32)
    n = 3000
    messages = np.stack([passed({"w": tensor}, codec, seed=seed)["w"] for seed in range(n)])
    standard_error = messages.std(axis=0) / np.sqrt(n)
    assert (np.abs(messages.mean(axis=0) - tensor) <= 5 * standard_error + 1e-4).all()


@pytest.mark.parametrize("codec", [TopK(fraction=0.2), RandomK(fraction=0.3)], ids=codec_text)
def test_sparse_contractions_are_not_unbiased_and_do_not_claim_it(codec: Codec) -> None:
    tensor = rng(1).normal(size=(3, 20)).astype(np.float32)
    mean = np.mean([passed({"w": tensor}, codec, seed=seed)["w"] for seed in range(500)], axis=0)
    assert np.abs(mean - tensor).max() > 0.1


@pytest.mark.parametrize("codec", [*COARSE, Int8(stochastic=True)], ids=codec_text)
def test_the_same_seed_gives_the_same_bytes(codec: Codec) -> None:
    tensors = {"w": rng(1).normal(size=(8, 30)).astype(np.float32), "b": np.ones(8, np.float32)}
    assert encoded(tensors, codec, seed=5) == encoded(tensors, codec, seed=5)
    draws = getattr(codec, "stochastic", False) or isinstance(codec, RandomK)
    assert (encoded(tensors, codec, seed=5) != encoded(tensors, codec, seed=6)) is draws


@pytest.mark.parametrize("codec", [Int8(stochastic=True), RandomK()], ids=codec_text)
def test_codecs_that_draw_want_a_generator(codec: Codec) -> None:
    with pytest.raises(ValueError, match="no generator"):
        encode_tensors({"w": np.ones((2, 2), np.float32)}, codec)


def test_selective_wants_the_norms_of_the_weights() -> None:
    with pytest.raises(ValueError, match="no norms"):
        encode_tensors({"w": np.ones((2, 2), np.float32)}, Selective())


def longest_bytes(specs: list[TensorSpec], codec: Codec) -> int:
    """What a receiver prepares for, the header's own bound apart."""
    decoder = implementation(codec).decoder
    return 500 + sum(part.n_bytes + 100 for spec in specs for part in parts_of(spec, decoder).values())


@pytest.mark.parametrize("codec", [Int8(), *COARSE], ids=codec_text)
def test_bytes_are_expected_within_a_factor_of_two(codec: Codec) -> None:
    tensors = {f"w{i}": rng(i).laplace(size=(64, 300)).astype(np.float32) for i in range(5)}
    assert 0.5 < len(encoded(tensors, codec)) / encoded_bytes(specs_of(tensors), codec) < 1.5


@pytest.mark.parametrize("codec", COARSE, ids=codec_text)
def test_every_shape_passes_and_no_message_is_longer_than_announced(codec: Codec) -> None:
    generator = rng(2)
    for shape in [(0, 3), (3, 0), (1, 1), (5, 7), (16, 3, 3, 3), (2, 40_000)]:
        for values in (np.zeros(shape), generator.normal(size=shape), np.full(shape, 1e38), np.full(shape, 1e-45)):
            tensors = {"layer.weight": values.astype(np.float32), "half": values.clip(-9, 9).astype(np.float16)}
            decoded = passed(tensors, codec) if np.abs(values).max(initial=0) < 1e38 or codec not in UNBIASED else None
            assert decoded is None or {name: a.shape for name, a in decoded.items()} == dict.fromkeys(tensors, shape)
            content = decompress(encoded(tensors, codec), max_bytes=2**30)
            assert len(content) <= longest_bytes(specs_of(tensors), codec)


@pytest.mark.parametrize("codec", COARSE, ids=codec_text)
def test_vectors_lose_at_most_half_of_their_mantissa_and_never_grow(codec: Codec) -> None:
    values = np.concatenate([rng(3).normal(size=50), [0, -0.0, 1e-45, 3.4e38, -3.4e38, 1e30, 2.0**-130]])
    tensors = {"bias": values.astype(np.float32), "scalar": np.array(-3.3, np.float32)}
    decoded = passed(tensors, codec)
    for name, tensor in tensors.items():
        assert decoded[name].shape == tensor.shape
        assert (np.abs(decoded[name]) <= np.abs(tensor)).all()
        assert (np.abs(decoded[name] - tensor) <= np.maximum(np.abs(tensor) * 2.0**-7, 2.0**-133)).all()
        assert (np.signbit(decoded[name]) == np.signbit(tensor)).all()


@pytest.mark.parametrize("codec", COARSE, ids=codec_text)
def test_a_variance_that_training_left_above_zero_stays_there(codec: Codec) -> None:
    before = rng(4).uniform(1e-6, 10, 200).astype(np.float32)
    after = (before * rng(5).uniform(1e-6, 1, 200)).astype(np.float32)
    received = passed({"running_var": after - before}, codec)["running_var"]
    assert (before + received >= 0).all()


# Indices, planes, halves.


@settings(max_examples=150, deadline=None)
@given(data=st.data(), n=st.integers(1, 40_000))
def test_indices_come_back_from_few_bytes(data: st.DataObject, n: int) -> None:
    k = data.draw(st.integers(0, min(n, 400)))
    indices = np.sort(rng(data.draw(st.integers(0, 99))).permutation(n)[:k])
    stored = encode_indices(indices, n)
    assert stored.size <= 1 + min((n + 7) // 8, 3 * k)
    np.testing.assert_array_equal(decode_indices(stored, k, n), indices)


@settings(max_examples=300, deadline=None)
@given(stored=st.binary(max_size=12), k=st.integers(0, 9), n=st.integers(1, 60))
def test_bytes_that_are_taken_for_indices_are_what_encoding_could_have_made(stored: bytes, k: int, n: int) -> None:
    data = np.frombuffer(stored, np.uint8)
    try:
        indices = decode_indices(data, k, n)
    except BundleError:
        return
    assert indices.shape == (k,)
    assert (np.diff(indices) > 0).all()
    assert ((indices >= 0) & (indices < n)).all()


@pytest.mark.parametrize(
    ("stored", "k"),
    [([], 0), ([2], 0), ([0, 128], 1), ([0, 128, 0], 1), ([0, 50], 1), ([0, 3], 2), ([1, 255], 4), ([1, 7], 3)],
)
def test_indices_that_encoding_cannot_have_made_are_refused(stored: list[int], k: int) -> None:
    with pytest.raises(BundleError):
        decode_indices(np.array(stored, np.uint8), k, 4)


@settings(max_examples=100, deadline=None)
@given(values=hnp.arrays(np.int8, st.integers(0, 70), elements=st.integers(-127, 127)))
def test_bit_planes_come_back(values: Array) -> None:
    np.testing.assert_array_equal(unpack_planes(pack_planes(values), values.size), values)
    small = np.clip(values, -7, 7)
    np.testing.assert_array_equal(unpack_halves(pack_halves(small), small.size), small)


@settings(max_examples=300, deadline=None)
@given(stored=st.binary(max_size=12), n=st.integers(0, 20))
def test_bytes_that_are_taken_for_bit_planes_are_within_bounds(stored: bytes, n: int) -> None:
    try:
        values = unpack_planes(np.frombuffer(stored, np.uint8), n)
    except BundleError:
        return
    assert values.shape == (n,)
    assert (np.abs(values.astype(int)) <= 127).all()


@settings(max_examples=60, deadline=None)
@given(values=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-3, 3, width=16)), data=st.data())
def test_the_largest_entries_are_those_of_a_full_sort(values: Array, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, values.size))
    expected = sorted(range(values.size), key=lambda i: (-abs(values[i]), i))[:k]
    assert largest(values, k).tolist() == sorted(expected)


def test_drawn_indices_are_the_same_on_every_platform_and_uniform() -> None:
    assert drawn(7, 0.3, 1000).tolist() == drawn_slowly(7, 300, 1000)
    n = 2 * BLOCK + 100
    once = drawn(1, 0.01, n)
    assert (np.diff(once) > 0).all()
    assert once[-1] < n
    counts = np.zeros(50)
    for seed in range(2000):
        counts[drawn(seed, 0.1, 50)] += 1
    assert counts.sum() == 2000 * 5
    assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()


def drawn_slowly(seed: int, k: int, m: int) -> list[int]:
    """splitmix64 as published, in Python's integers; m is at most a block."""
    keys = []
    for i in range(m):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        keys.append(((z ^ z >> 31) >> 16, i))
    return sorted(i for _, i in sorted(keys)[:k])


# Layer-wise allocation.


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_allocation_is_the_best_of_all_within_its_budget(data: st.DataObject) -> None:
    n_layers = data.draw(st.integers(1, 4))
    generator = rng(data.draw(st.integers(0, 999)))
    layers = [
        [
            Candidate(error, n_bytes)
            for error, n_bytes in zip(
                np.sort(generator.uniform(0, 10, 4))[::-1], np.sort(generator.uniform(0, 100, 4)), strict=True
            )
        ]
        for _ in range(n_layers)
    ]
    budget = data.draw(st.floats(0.05, 0.9))
    chosen = allocate(layers, budget)
    total = sum(layer[0].squared_error for layer in layers)

    def cost(choice: tuple[int, ...], slack: float) -> float:
        error = sum(layer[i].squared_error for layer, i in zip(layers, choice, strict=True))
        bytes_then = sum(layer[i].n_bytes for layer, i in zip(layers, choice, strict=True))
        return bytes_then if error <= budget * total * slack else np.inf

    every = list(product(range(4), repeat=n_layers))
    if np.isinf(min(cost(choice, 1.0) for choice in every)):
        assert chosen == [3] * n_layers
        return
    found = cost(tuple(chosen), 1.0)
    # Errors are rounded up to a thousandth of the budget: a choice may be missed that is as close to it as that.
    assert found <= min(cost(choice, 1 - 0.001 * n_layers) for choice in every)


def test_layer_wise_spends_its_bytes_where_the_error_is() -> None:
    loud, quiet = rng(1).normal(size=(32, 90)), rng(2).normal(size=(32, 90)) * 1e-3
    tensors = {"loud": loud.astype(np.float32), "quiet": quiet.astype(np.float32)}
    decoded = passed(tensors, LayerWise(error_budget=0.2))
    assert not decoded["quiet"].any()
    assert 0.1 < np.sqrt(squared(decoded["loud"] - loud) / squared(loud)) <= 0.2


@settings(max_examples=40, deadline=None)
@given(arrays=st.lists(matrices(100.0), min_size=1, max_size=5), budget=st.floats(0.02, 0.9))
def test_the_error_of_the_whole_model_is_within_the_budget(arrays: list[Array], budget: float) -> None:
    tensors = {f"w{i}": array for i, array in enumerate(arrays)}
    decoded = passed(tensors, LayerWise(error_budget=budget))
    error = sum(squared(decoded[name] - tensor.astype(np.float64)) for name, tensor in tensors.items())
    assert error <= budget**2 * sum(squared(tensor) for tensor in arrays) * (1 + 1e-5) + 1e-60


# Selective updating.


def test_channels_that_change_little_stay_at_home() -> None:
    weights = {"w": np.ones((4, 25), np.float32)}
    update = {"w": np.repeat(np.array([[0.5], [0.01], [0.2], [0.09]], np.float32), 25, axis=1)}
    data = encode_tensors(update, Selective(threshold=0.1), norms=weight_norms(weights))
    decoded = decode_tensors(data, Selective(threshold=0.1), specs_of(update))["w"]
    assert not decoded[[1, 3]].any()
    np.testing.assert_allclose(decoded[[0, 2]], update["w"][[0, 2]], rtol=0.01)


def test_the_largest_change_of_the_model_always_travels() -> None:
    weights = {"a": np.ones((2, 9), np.float32), "b": np.ones((2, 9), np.float32)}
    update = {"a": np.full((2, 9), 1e-4, np.float32), "b": np.array([[2e-4] * 9, [3e-4] * 9], np.float32)}
    decoded = decode_tensors(
        encode_tensors(update, Selective(threshold=0.5), norms=weight_norms(weights)),
        Selective(threshold=0.5),
        specs_of(update),
    )
    assert not decoded["a"].any()
    assert decoded["b"].any(axis=1).tolist() == [False, True]


def test_new_channels_of_weights_that_were_zero_travel() -> None:
    weights = {"w": np.zeros((2, 3), np.float32)}
    update = {"w": np.array([[1e-9] * 3, [0] * 3], np.float32)}
    data = encode_tensors(update, Selective(threshold=0.5), norms=weight_norms(weights))
    assert decode_tensors(data, Selective(threshold=0.5), specs_of(update))["w"][0].any()


# Hostile bytes.

TENSORS = {
    "w": np.linspace(-1, 1, 60).reshape(4, 15).astype(np.float32),
    "b": np.ones(4, np.float32),
    "n": np.array(3),
}


@settings(max_examples=400, deadline=None)
@given(data=st.data(), codec=st.sampled_from(COARSE))
def test_damaged_content_raises_bundle_error_and_nothing_else(data: st.DataObject, codec: Codec) -> None:
    stored, metadata = unpack_tensors(encoded(TENSORS, codec), max_bytes=2**20)
    damaged = {name: array.copy() for name, array in stored.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(damaged)))
        array = damaged[name]
        if array.size and data.draw(st.booleans()):
            array.reshape(-1).view(np.uint8)[data.draw(st.integers(0, array.nbytes - 1))] = data.draw(
                st.integers(0, 255)
            )
        elif array.ndim == 1:
            damaged[name] = np.resize(array, data.draw(st.integers(0, 2 * array.size + 2)))
    try:
        decoded = decode_tensors(pack_tensors(damaged, metadata), codec, specs_of(TENSORS))
    except BundleError:
        return
    assert {name: (a.shape, a.dtype) for name, a in decoded.items()} == {
        n: (a.shape, a.dtype) for n, a in TENSORS.items()
    }
    assert all(np.isfinite(array).all() for array in decoded.values())


@pytest.mark.parametrize("codec", COARSE, ids=codec_text)
def test_a_container_that_claims_more_than_its_codec_needs_is_not_decompressed(codec: Codec) -> None:
    content = decompress(encoded(TENSORS, codec), max_bytes=2**20)
    with pytest.raises(BundleError, match="claims"):
        decode_tensors(compress(content + bytes(5 * 2**20)), codec, specs_of(TENSORS))


def test_equal_codecs_have_equal_texts() -> None:
    assert codec_text(TopK(fraction=float("0.05"))) == codec_text(TopK()) == "top_k"
    assert codec_text(TopK(fraction=0.5, values="float32")) == "top_k fraction=0.5 values=float32"


def test_a_decoder_takes_only_the_options_that_were_announced() -> None:
    data = encoded(TENSORS, TopK(fraction=0.2))
    with pytest.raises(BundleError, match="announced"):
        decode_tensors(data, TopK(fraction=0.3), specs_of(TENSORS))
