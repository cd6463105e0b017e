from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.compile.channels import ChannelMap
from reft_edge.errors import BundleError, ModelError

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def maps(draw: st.DrawFn) -> ChannelMap:
    """Maps of two tensors: one by axes, one by any entries in any order."""
    shape = draw(SHAPES)
    axes = [np.array(sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))) for n in shape]
    by_axes = np.arange(int(np.prod(shape))).reshape(shape)[np.ix_(*axes)]
    size = draw(st.integers(1, 20))
    loose = np.array(draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1)))
    return ChannelMap({"a": by_axes, "b": loose}, {"a": shape, "b": (size,)})


def global_tensors(channels: ChannelMap, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in channels.global_shapes.items()}


@given(maps())
def test_gather_reads_the_entries_that_the_indices_name(channels: ChannelMap) -> None:
    tensors = global_tensors(channels, 0)
    for name, values in channels.gather(tensors).items():
        assert np.array_equal(values, tensors[name].reshape(-1)[channels.indices[name]])
        assert values.shape == channels.variant_shapes[name]


@given(maps())
def test_scatter_writes_what_gather_reads_and_nothing_else(channels: ChannelMap) -> None:
    into, values = global_tensors(channels, 0), channels.gather(global_tensors(channels, 1))
    before = {name: tensor.copy() for name, tensor in into.items()}
    channels.scatter(channels.gather(before), into)
    assert all(np.array_equal(into[name], before[name]) for name in before)
    channels.scatter(values, into)
    for name, flat in channels.indices.items():
        expected = before[name].copy().reshape(-1)
        expected[flat] = values[name]
        assert np.array_equal(into[name], expected.reshape(before[name].shape))


@given(maps())
def test_bytes_round_trip(channels: ChannelMap) -> None:
    data = channels.to_bytes()
    again = ChannelMap.from_bytes(data)
    assert again == channels
    assert again.to_bytes() == data


@given(maps(), st.data())
def test_composition_gathers_twice(outer: ChannelMap, data: st.DataObject) -> None:
    inner_indices = {}
    for name, shape in outer.variant_shapes.items():
        size = int(np.prod(shape))
        axes = [np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))) for n in shape]
        inner_indices[name] = np.arange(size).reshape(shape)[np.ix_(*axes)]
    inner = ChannelMap(inner_indices, outer.variant_shapes)
    tensors = global_tensors(outer, 0)
    twice = inner.gather(outer.gather(tensors))
    assert all(np.array_equal(values, twice[name]) for name, values in outer.compose(inner).gather(tensors).items())


def test_identity_is_the_whole_model() -> None:
    tensors = {"w": np.ones((3, 2)), "n": np.array(4)}
    identity = ChannelMap.identity(tensors)
    assert identity.is_identity
    assert identity.share == 1.0
    assert identity == ChannelMap({"w": np.arange(6).reshape(3, 2), "n": np.array(0)}, {"w": (3, 2), "n": ()})


def test_a_large_map_by_axes_is_small() -> None:
    shape = (512, 512, 3, 3)
    kept = np.arange(0, 512, 2)
    flat = np.arange(np.prod(shape)).reshape(shape)[kept][:, kept]
    channels = ChannelMap({"w": flat}, {"w": shape})
    assert channels.share == 0.25
    assert len(channels.to_bytes()) < 2000


@pytest.mark.parametrize(
    ("flat", "why"),
    [
        ([0, 6], "outside"),
        ([-1, 2], "outside"),
        ([1, 1], "twice"),
        ([0.5, 1.0], "float64"),
        ([[0, 1]], "into a tensor"),
    ],
)
def test_indices_that_are_no_map_are_refused(flat: list[float], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        ChannelMap({"w": np.array(flat)}, {"w": (6,)})


def test_tensors_of_other_shapes_are_refused_and_nothing_changes() -> None:
    channels = ChannelMap({"w": np.array([0, 2]), "v": np.array([1])}, {"w": (3,), "v": (2,)})
    into = {"w": np.zeros(3), "v": np.zeros(2)}
    with pytest.raises(ModelError, match="expected"):
        channels.scatter({"w": np.ones(2), "v": np.ones(2)}, into)
    with pytest.raises(ModelError, match="lack 'v'"):
        channels.gather({"w": np.zeros(3)})
    with pytest.raises(ModelError, match="unknown"):
        channels.gather({**into, "x": np.zeros(1)})
    assert not into["w"].any()


def test_other_containers_are_refused() -> None:
    from reft_edge.bundle.container import pack_tensors

    for tensors, metadata in (
        ({}, {}),
        ({"w|0": np.array([0, 9])}, {"format": "reft channel map 1", "shapes": '{"w": [3]}'}),
        ({"w|0": np.array([2, 1])}, {"format": "reft channel map 1", "shapes": '{"w": [3]}'}),
        ({"x|0": np.array([0])}, {"format": "reft channel map 1", "shapes": '{"w": [3]}'}),
        ({"w|flat": np.array([7])}, {"format": "reft channel map 1", "shapes": '{"w": [3]}'}),
        ({}, {"format": "reft channel map 1", "shapes": "[]"}),
    ):
        with pytest.raises(BundleError):
            ChannelMap.from_bytes(pack_tensors(tensors, metadata))
