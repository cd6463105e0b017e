"""Properties of the index-aware weighted mean, and agreement with a slow, obvious reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.compile.channels import ChannelMap
from reft_edge.coordinator.aggregation import ClientUpdate, merge
from reft_edge.errors import FederationError

SHAPES = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "bn.num_batches_tracked": (), "odd": (5, 4)}


def global_model(seed=0):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return tensors | {"bn.num_batches_tracked": np.array(10, np.int64), "mask": np.array([True, False])}


def update(rng, device="a", weight=1.0):
    """A random variant: kept positions along each axis, and for `odd` entries that are no product of positions."""
    indices, shapes = {}, SHAPES | {"mask": (2,)}
    for name, shape in shapes.items():
        flat = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        for axis, size in enumerate(shape):
            flat = flat.take(np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False)), axis)
        indices[name] = flat
    indices["odd"] = np.sort(rng.choice(20, 6, replace=False)).astype(np.int64).reshape(3, 2)
    delta = {name: rng.normal(size=flat.shape).astype(np.float32) for name, flat in indices.items()}
    delta["bn.num_batches_tracked"] = np.array(rng.integers(0, 9))
    delta["mask"] = np.ones(indices["mask"].shape, np.bool_)
    return ClientUpdate(device=device, channels=ChannelMap(indices, shapes), delta=delta, weight=weight)


def slow_merge(tensors, updates):
    """Entry by entry, as the formula says."""
    merged = {name: tensor.copy() for name, tensor in tensors.items()}
    for name, tensor in merged.items():
        if tensor.dtype == np.bool_:
            continue
        for position in range(tensor.size):
            total = weight = 0.0
            for one in updates:
                for index, value in zip(one.channels.indices[name].flat, one.delta[name].flat, strict=True):
                    if index == position:
                        total += one.weight * float(value)
                        weight += one.weight
            if weight:
                step = total / weight
                tensor.reshape(-1)[position] += round(step) if tensor.dtype == np.int64 else step
    return merged


def assert_close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        np.testing.assert_allclose(tensor, other[name], rtol=tolerance, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_updates=st.integers(0, 4))
def test_equals_the_formula_and_ignores_the_order_and_the_scale_of_the_weights(seed, n_updates):
    rng = np.random.default_rng(seed)
    tensors = global_model(seed)
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    updates = [update(rng, str(k), float(rng.uniform(0.1, 9))) for k in range(n_updates)]
    merged = merge(tensors, iter(updates))
    assert_close(merged, slow_merge(tensors, updates))
    assert_close(merged, merge(tensors, reversed(updates)))
    heavier = [
        ClientUpdate(device=u.device, channels=u.channels, delta=u.delta, weight=u.weight * 1e6) for u in updates
    ]
    assert_close(merged, merge(tensors, heavier))
    assert_close(tensors, before, 0)  # the arguments are untouched


def test_nobody_trained_means_nothing_moves_and_equal_updates_move_by_that_update():
    tensors = global_model()
    assert_close(merge(tensors, []), tensors, 0)
    one = update(np.random.default_rng(1))
    alone = merge(tensors, [one])
    assert_close(alone, merge(tensors, [one] * 3))
    moved = one.channels.gather(alone)
    for name, start in one.channels.gather(tensors).items():
        if start.dtype == np.float32:
            np.testing.assert_allclose(moved[name], start + one.delta[name], rtol=1e-6)


def test_with_identity_maps_it_is_federated_averaging():
    tensors = {"w": np.array([[1.0, 2.0]], np.float32)}
    channels = ChannelMap.identity(tensors)
    trained = [(np.array([[2.0, 2.0]], np.float32), 1.0), (np.array([[6.0, 10.0]], np.float32), 3.0)]
    updates = [ClientUpdate(device="x", channels=channels, delta={"w": w - tensors["w"]}, weight=n) for w, n in trained]
    np.testing.assert_allclose(merge(tensors, updates)["w"], [[5.0, 8.0]])


def test_over_the_cohort_an_entry_moves_by_the_share_of_the_weights_that_hold_it():
    rng = np.random.default_rng(3)
    tensors = global_model()
    updates = [update(rng, str(k), weight) for k, weight in enumerate((1.0, 2.0, 5.0))]
    usual, over_cohort = merge(tensors, updates), merge(tensors, updates, over_cohort={"conv.weight", "odd"})
    for name in ("conv.weight", "odd"):
        held = np.zeros(tensors[name].size)
        for one in updates:
            held[one.channels.indices[name].reshape(-1)] += one.weight
        expected = (usual[name] - tensors[name]) * (held / 8.0).reshape(tensors[name].shape)
        np.testing.assert_allclose(over_cohort[name] - tensors[name], expected, atol=1e-6)
    for name in tensors.keys() - {"conv.weight", "odd"}:
        np.testing.assert_array_equal(over_cohort[name], usual[name])
    assert_close(merge(tensors, [], over_cohort={"odd"}), tensors, 0)


@pytest.mark.parametrize(
    ("delta", "weight", "message"),
    [
        ({"w": np.zeros((2, 2), np.float32)}, 0.0, "weighs"),
        ({"w": np.zeros((2, 2), np.float32)}, float("nan"), "weighs"),
        ({"w": np.zeros((2, 1), np.float32)}, 1.0, r"\(2, 1\)"),
        ({"v": np.zeros((2, 2), np.float32)}, 1.0, "variant lacks"),
        ({"w": np.full((2, 2), np.inf, np.float32)}, 1.0, "not finite"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_by_the_device_s_name(delta, weight, message):
    tensors = {"w": np.zeros((2, 2), np.float32)}
    channels = ChannelMap.identity(tensors)
    with pytest.raises(FederationError, match=f"'pi'.*{message}"):
        merge(tensors, [ClientUpdate(device="pi", channels=channels, delta=delta, weight=weight)])
