"""Weights that travel as a difference: both sides get the same numbers, and what is left out comes later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.bundle.manifest import TensorSpec
from reft_edge.errors import BundleError
from reft_edge.wire.codec_names import Codec, Float16, Float32, Int8
from reft_edge.wire.codecs import decode_tensors, encode_tensors
from reft_edge.wire.deltas import check_values, encode_delta, rebuild, values_digest

if TYPE_CHECKING:
    from reft_edge.types import Array

SPECS = (
    TensorSpec(name="conv.weight", shape=(8, 3, 3, 3), dtype="float32"),
    TensorSpec(name="conv.bias", shape=(8,), dtype="float32"),
    TensorSpec(name="norm.running_var", shape=(8,), dtype="float32"),
    TensorSpec(name="norm.num_batches_tracked", shape=(), dtype="int64"),
    TensorSpec(name="half", shape=(4, 4), dtype="float16"),
    TensorSpec(name="mask", shape=(5,), dtype="bool"),
    TensorSpec(name="levels", shape=(6,), dtype="uint8"),
)

WEIGHTS: list[Codec] = [Float32(), Float16(), Int8(), Int8(stochastic=True)]
DELTAS: list[Codec] = [Float32(), Float16(), Int8(), Int8(stochastic=True)]


def tensors(seed: int, *, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for spec in SPECS:
        values = np.asarray(rng.normal(scale=scale, size=spec.shape))
        if spec.name.endswith("running_var"):
            values = np.exp(8 * values)
        if spec.dtype in ("int64", "uint8"):
            values = np.abs(50 * values)
        found[spec.name] = np.array(values > 0.5 if spec.dtype == "bool" else values, dtype=spec.dtype)
    return found


def published(values: dict[str, Array], codec: Codec) -> dict[str, Array]:
    """What a device decodes of a whole blob."""
    return decode_tensors(encode_tensors(values, codec, rng=np.random.default_rng(0)), codec, SPECS)


def nearer(start: dict[str, Array], end: dict[str, Array], share: float) -> dict[str, Array]:
    """As after a round: floats have moved a little, the rest has become what it should."""
    return {
        name: (start[name] + share * (end[name] - start[name])).astype(start[name].dtype)
        if start[name].dtype.kind == "f"
        else end[name]
        for name in start
    }


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("delta", DELTAS, ids=str)
def test_the_delta_and_the_whole_blob_give_the_same_numbers(weights: Codec, delta: Codec) -> None:
    base, wanted = published(tensors(1), weights), nearer(tensors(1), tensors(2), 0.1)
    data = encode_delta(wanted, base, delta)
    assert data == encode_delta(wanted, base, delta)
    here = rebuild(dict(base), data, delta_codec=delta, weights_codec=weights, specs=SPECS)
    there = rebuild(dict(base), data, delta_codec=delta, weights_codec=weights, specs=SPECS)
    assert here.blob == there.blob
    whole = decode_tensors(here.blob, weights, SPECS)
    assert values_digest(whole) == values_digest(here.tensors) == values_digest(there.tensors)
    for name in ("norm.num_batches_tracked", "mask", "levels"):
        np.testing.assert_array_equal(here.tensors[name], wanted[name])
    assert (here.tensors["norm.running_var"] >= 0).all()
    # One rounding of the change, and one of the weights.
    change, size = (max(np.abs(np.asarray(x["conv.weight"])).max(), 1e-9) for x in (nearer_change(wanted, base), base))
    np.testing.assert_allclose(
        here.tensors["conv.weight"], wanted["conv.weight"], atol=1.01 * change / 127 + 1.2 * size / 127
    )


def nearer_change(wanted: dict[str, Array], base: dict[str, Array]) -> dict[str, Array]:
    return {"conv.weight": wanted["conv.weight"] - base["conv.weight"]}


@pytest.mark.parametrize("weights", [Float32(), Float16()], ids=str)
def test_what_a_round_leaves_out_comes_with_the_next(weights: Codec) -> None:
    """Weights that stay where they are are reached, though every delta is a coarse one."""
    wanted = tensors(7)
    held = published(tensors(8), weights)
    distances = []
    for _ in range(6):
        data = encode_delta(wanted, held, Int8())
        held = rebuild(held, data, delta_codec=Int8(), weights_codec=weights, specs=SPECS).tensors
        distances.append(np.abs(held["conv.weight"] - wanted["conv.weight"]).max())
    precision = 1e-6 if weights == Float32() else 2e-3
    assert distances[0] > distances[-1]
    assert distances[-1] < precision


@given(st.sampled_from(SPECS), st.integers(0, 2**32 - 1))
def test_the_digest_knows_every_value_its_dtype_and_its_name(spec: TensorSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = tensors(3)
    digest = values_digest(before)
    assert values_digest(dict(reversed(before.items()))) == digest
    after = {name: array.copy() for name, array in before.items()}
    raw = after[spec.name].reshape(-1).view(np.uint8)
    raw[rng.integers(raw.size)] ^= 1
    assert values_digest(after) != digest
    with pytest.raises(BundleError, match="not what the coordinator has"):
        check_values(after, digest)
    renamed = {**before, "other": before[spec.name]}
    del renamed[spec.name]
    assert values_digest(renamed) != digest


def test_a_delta_that_does_not_fit_or_leads_beyond_floats_is_refused() -> None:
    base = tensors(1)
    data = encode_delta(tensors(2), base, Int8())
    for odd in (data[:-5], b"", encode_tensors(tensors(2), Float32())):
        with pytest.raises(BundleError):
            rebuild(dict(base), odd, delta_codec=Int8(), weights_codec=Float32(), specs=SPECS)
    with pytest.raises(BundleError):
        rebuild(dict(base), data, delta_codec=Int8(), weights_codec=Float32(), specs=SPECS[:-1])
    huge = {**tensors(2), "conv.bias": np.full(8, 3e38, np.float32)}
    with pytest.raises(BundleError, match="not finite"):
        encode_delta(huge, {**base, "conv.bias": np.full(8, -3e38, np.float32)}, Int8())
    leap = encode_delta(huge, {**base, "conv.bias": np.zeros(8, np.float32)}, Int8())
    far = {**base, "conv.bias": np.full(8, 3e38, np.float32)}
    with pytest.raises(BundleError, match="not finite"):
        rebuild(far, leap, delta_codec=Int8(), weights_codec=Float32(), specs=SPECS)
