"""What a codec leaves out: kept, sent later, or remembered on both sides."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.bundle.manifest import TensorSpec
from reft_edge.errors import BundleError
from reft_edge.wire.codec_names import Codec, Float32, Int4, Int8, LayerWise, RandomK, Selective, TopK, codec_text
from reft_edge.wire.codecs import weight_norms
from reft_edge.wire.compensation.deep_gradient import LEFTOVER, MOMENTUM_OF, warm_up_fraction
from reft_edge.wire.compensation.econtrol import ESTIMATE, RESIDUAL
from reft_edge.wire.compensation.methods import codec_in_round, decode_update, update_encoder
from reft_edge.wire.compensation_names import (
    Compensation,
    DeepGradientOptions,
    EControlOptions,
    EF21Options,
    ErrorFeedbackOptions,
    Uncompensated,
    find_compensation,
    keeps_memory,
)

if TYPE_CHECKING:
    from reft_edge.types import Array

CONTRACTIONS: tuple[Codec, ...] = (
    Int8(),
    Int4(),
    TopK(fraction=0.2),
    TopK(fraction=0.1, values="float32"),
    RandomK(fraction=0.3),
    LayerWise(error_budget=0.5),
    Selective(threshold=0.3),
)
METHODS: tuple[Compensation, ...] = (
    Uncompensated(),
    ErrorFeedbackOptions(),
    EF21Options(),
    EControlOptions(strength=0.5),
    DeepGradientOptions(),
)
SHAPE = (3, 8)
SPECS = [
    TensorSpec(name="w", shape=SHAPE),
    TensorSpec(name="b", shape=(3,)),
    TensorSpec(name="half", shape=(2, 3), dtype="float16"),
    TensorSpec(name="n", shape=(), dtype="int64"),
]
NORMS = weight_norms({"w": np.ones(SHAPE, np.float32), "half": np.ones((2, 3), np.float32)})

rounds_of_updates = st.lists(
    hnp.arrays(np.float32, SHAPE, elements=st.floats(-100, 100, width=32)), min_size=1, max_size=8
)


def update_of(values: Array) -> dict[str, Array]:
    return {
        "w": values,
        "b": values[:, 0].copy(),
        "half": values[:2, :3].astype(np.float16),
        "n": np.array(5),
    }


class Pair:
    """A device and its coordinator; the device's process is a new one in every round."""

    def __init__(self, compensation: Compensation, codec: Codec) -> None:
        self._compensation = compensation
        self._codec = codec
        self._rng = np.random.default_rng(0)
        self.state: dict[str, Array] = {}
        self.memory: dict[str, Array] = {}

    def exchange(self, update: dict[str, Array]) -> dict[str, Array]:
        encoder = update_encoder(self._compensation, self._codec, self.state)
        data = encoder.encode(update, rng=self._rng, norms=NORMS)
        self.state = encoder.state
        received, self.memory = decode_update(self._compensation, data, self._codec, SPECS, self.memory)
        return received


@pytest.mark.parametrize("compensation", METHODS, ids=str)
@pytest.mark.parametrize("codec", [*CONTRACTIONS, Float32()], ids=codec_text)
def test_every_method_works_with_every_contraction(compensation: Compensation, codec: Codec) -> None:
    pair = Pair(compensation, codec)
    generator = np.random.default_rng(3)
    for _ in range(3):
        update = update_of(generator.normal(size=SHAPE).astype(np.float32))
        received = pair.exchange(update)
        assert {name: (a.shape, a.dtype) for name, a in received.items()} == {
            name: (a.shape, a.dtype) for name, a in update.items()
        }
        np.testing.assert_array_equal(received["n"], update["n"])
        np.testing.assert_allclose(received["b"], update["b"], rtol=2.0**-7)
        if codec == Float32() and not isinstance(compensation, DeepGradientOptions):
            np.testing.assert_array_equal(received["w"], update["w"])
    assert bool(pair.memory) is (keeps_memory(compensation) and codec != Float32())


@settings(max_examples=60, deadline=None)
@given(updates=rounds_of_updates, codec=st.sampled_from(CONTRACTIONS))
def test_error_feedback_and_econtrol_keep_the_sum_of_the_updates(updates: list[Array], codec: Codec) -> None:
    for compensation, residual in ((ErrorFeedbackOptions(), "w"), (EControlOptions(strength=0.4), RESIDUAL + "w")):
        pair = Pair(compensation, codec)
        sent = np.sum([pair.exchange(update_of(update))["w"] for update in updates], axis=0, dtype=np.float64)
        true = np.sum(updates, axis=0, dtype=np.float64)
        scale = max(1.0, float(np.abs(pair.state[residual]).max()))
        np.testing.assert_allclose(sent + pair.state[residual], true, atol=1e-3 * scale)


@settings(max_examples=60, deadline=None)
@given(updates=rounds_of_updates, codec=st.sampled_from(CONTRACTIONS))
def test_device_and_coordinator_remember_the_same_bits(updates: list[Array], codec: Codec) -> None:
    for compensation, prefix in ((EF21Options(), ""), (EControlOptions(), ESTIMATE)):
        pair = Pair(compensation, codec)
        for update in updates:
            received = pair.exchange(update_of(update))
            assert sorted(pair.memory) == ["half", "w"]
            for name, remembered in pair.memory.items():
                assert remembered.dtype == np.float32
                assert remembered.tobytes() == pair.state[prefix + name].tobytes()
            np.testing.assert_array_equal(received["w"], pair.memory["w"])


@pytest.mark.parametrize("codec", [TopK(fraction=0.1), Int4(), LayerWise(error_budget=0.6)], ids=codec_text)
def test_ef21_comes_to_an_update_that_stays_the_same(codec: Codec) -> None:
    pair = Pair(EF21Options(), codec)
    update = update_of(np.random.default_rng(1).normal(size=SHAPE).astype(np.float32))
    errors = [np.linalg.norm(pair.exchange(update)["w"] - update["w"]) for _ in range(30)]
    assert all(after <= before * (1 + 1e-5) + 1e-6 for before, after in pairwise(errors))
    assert errors[-1] < 0.01 * np.linalg.norm(update["w"])


@pytest.mark.parametrize(
    "codec", [TopK(fraction=0.1), RandomK(fraction=0.2), LayerWise(error_budget=0.7)], ids=codec_text
)
def test_the_residual_of_error_feedback_does_not_grow_without_end(codec: Codec) -> None:
    pair = Pair(ErrorFeedbackOptions(), codec)
    generator = np.random.default_rng(1)
    sizes = []
    for _ in range(200):
        pair.exchange(update_of(generator.normal(size=SHAPE).astype(np.float32)))
        sizes.append(float(np.linalg.norm(pair.state["w"])))
    assert max(sizes[100:]) < 2 * max(sizes[:100])


@settings(max_examples=40, deadline=None)
@given(updates=st.lists(hnp.arrays(np.float32, SHAPE, elements=st.integers(-10, 10)), min_size=1, max_size=8))
def test_momentum_sends_all_of_an_update_in_the_end(updates: list[Array]) -> None:
    """Entries that have never been sent are not masked: u and v hold all of what has not arrived."""
    options = DeepGradientOptions(momentum=0.6, clip=1000)
    pair = Pair(options, TopK(fraction=0.01))  # of 24 entries, one
    sent = np.zeros(SHAPE)
    for update in updates:
        u = pair.state.get(MOMENTUM_OF + "w", np.zeros(SHAPE))
        v = pair.state.get(LEFTOVER + "w", np.zeros(SHAPE))
        received = pair.exchange(update_of(update))["w"]
        gathered = 0.6 * u + 0.4 * update
        sent += received
        masked = received != 0
        np.testing.assert_allclose(pair.state[LEFTOVER + "w"] + received, v + gathered, atol=1e-3)
        np.testing.assert_allclose(pair.state[MOMENTUM_OF + "w"], np.where(masked, 0, gathered), atol=1e-3)
    untouched = sent == 0
    owed = pair.state[LEFTOVER + "w"] + pair.state[MOMENTUM_OF + "w"] * (0.6 / 0.4)
    np.testing.assert_allclose(owed[untouched], np.sum(updates, axis=0, dtype=np.float64)[untouched], atol=1e-2)


def test_an_update_far_longer_than_the_devices_own_is_clipped() -> None:
    pair = Pair(DeepGradientOptions(momentum=0.0, clip=2.0), Int8())
    usual = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    for _ in range(4):
        pair.exchange(update_of(usual))
    received = pair.exchange(update_of(usual * 50))
    length = np.sqrt(squared(received["w"]) + squared(received["half"]))
    expected = 2 * np.sqrt(squared(usual) + squared(usual[:2, :3]))
    assert length == pytest.approx(expected, rel=0.02)
    np.testing.assert_array_equal(received["b"], usual[:, 0] * 50)  # vectors are not clipped


def squared(array: Array) -> float:
    return float(np.square(array.astype(np.float64)).sum())


def test_the_warm_up_starts_dense_and_ends_at_the_codecs_own_fraction() -> None:
    fractions = [warm_up_fraction(0.01, round_number=number, rounds=4) for number in range(1, 8)]
    assert fractions[0] == 0.25
    assert fractions[4:] == [0.01] * 3
    ratios = {round(b / a, 9) for a, b in pairwise(fractions[:5])}
    assert len(ratios) == 1
    assert codec_in_round(TopK(fraction=0.01), DeepGradientOptions(), 1) == TopK(fraction=0.25)
    assert codec_in_round(TopK(fraction=0.01), ErrorFeedbackOptions(), 1) == TopK(fraction=0.01)
    assert codec_in_round(Int4(), DeepGradientOptions(), 1) == Int4()
    assert codec_in_round(TopK(fraction=0.4), DeepGradientOptions(), 1) == TopK(fraction=0.4)


@pytest.mark.parametrize("compensation", METHODS, ids=str)
def test_values_that_are_not_finite_are_refused_and_the_state_is_kept(compensation: Compensation) -> None:
    encoder = update_encoder(compensation, Int4())
    encoder.encode(update_of(np.ones(SHAPE, np.float32)), norms=NORMS)
    before = encoder.state
    broken = np.ones(SHAPE, np.float32)
    broken[1, 2] = np.nan
    with pytest.raises(BundleError, match="not finite"):
        encoder.encode(update_of(broken), norms=NORMS)
    assert {name: array.tobytes() for name, array in encoder.state.items()} == {
        name: array.tobytes() for name, array in before.items()
    }


@pytest.mark.parametrize("compensation", METHODS, ids=str)
def test_a_state_of_other_shapes_counts_as_none(compensation: Compensation) -> None:
    fresh = update_encoder(compensation, Int4())
    names = ("w", MOMENTUM_OF + "w", LEFTOVER + "w", ESTIMATE + "w", RESIDUAL + "w")
    other = update_encoder(compensation, Int4(), {name: np.ones((9, 9), np.float32) for name in names})
    update = update_of(np.random.default_rng(1).normal(size=SHAPE).astype(np.float32))
    assert fresh.encode(update) == other.encode(update)


def test_a_memory_that_grows_beyond_all_numbers_is_refused() -> None:
    huge = {"w": np.full(SHAPE, 3e38, np.float32)}
    data = update_encoder(EF21Options(), Int8()).encode(update_of(np.full(SHAPE, 6e4, np.float32)))
    decode_update(EF21Options(), data, Int8(), SPECS, huge)
    data = update_encoder(EF21Options(), Int8()).encode(update_of(np.full(SHAPE, 6e4, np.float32)) | huge)
    with pytest.raises(BundleError, match="beyond"):
        decode_update(EF21Options(), data, Int8(), SPECS, huge)


def test_names_and_options_stand_for_the_same_methods() -> None:
    assert find_compensation("econtrol") == EControlOptions()
    assert find_compensation(EControlOptions(strength=1.0)) == EControlOptions(strength=1.0)
