"""Properties of the robust rules, and agreement with slow, obvious references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reft_edge.compile.channels import ChannelMap
from reft_edge.coordinator.aggregation import ClientUpdate, merge
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.robust import flag
from reft_edge.coordinator.robust.coordinate_wise import median, trimmed_mean
from reft_edge.coordinator.robust.geometry import measure
from reft_edge.coordinator.robust.merging import merge_robustly
from reft_edge.coordinator.robust.nearest_neighbours import mixed_trimmed_mean, nearest
from reft_edge.coordinator.robust.stack import UpdateStack
from reft_edge.coordinator.settings import load_federation, run_digest
from reft_edge.errors import ConfigError, FederationError

RULES = ("trimmed_mean", "median", "monna", "flag")
PARAMETERS = ("conv.weight", "odd")
SHAPES = {"conv.weight": (6, 4), "odd": (5, 4), "bn.running_var": (6,), "bn.num_batches_tracked": (), "mask": (2,)}
SEEDS = st.integers(0, 10_000)


def global_model():
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return tensors | {"bn.num_batches_tracked": np.array(10, np.int64), "mask": np.array([True, False])}


def whole_map():
    return ChannelMap.identity(global_model())


def random_map(rng):
    """Kept positions along each axis, and for `odd` entries that are no product of positions."""
    indices = {}
    for name, shape in SHAPES.items():
        flat = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        for axis, size in enumerate(shape):
            flat = flat.take(np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False)), axis)
        indices[name] = flat
    indices["odd"] = np.sort(rng.choice(20, 6, replace=False)).astype(np.int64).reshape(3, 2)
    return ChannelMap(indices, SHAPES)


def update(rng, channels, device="a"):
    delta = {name: rng.normal(size=shape).astype(np.float32) for name, shape in channels.variant_shapes.items()}
    delta["bn.num_batches_tracked"] = np.array(rng.integers(0, 9))
    delta["mask"] = np.ones(channels.variant_shapes["mask"], np.bool_)
    return ClientUpdate(device=device, channels=channels, delta=delta, weight=float(rng.uniform(1, 9)))


def cohort(seed, n_devices, make_map: Callable = random_map):
    rng = np.random.default_rng(seed)
    return [update(rng, make_map(rng), f"d{k}") for k in range(n_devices)]


def merged(updates, tensors=None, **options):
    return merge_robustly(
        tensors or global_model(), iter(updates), settings=AggregationSettings(**options), parameters=PARAMETERS
    )


def assert_close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        np.testing.assert_allclose(tensor, other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def sent(updates, name):
    """For each flat entry of the global tensor: (device, value) of those who sent one."""
    found = [[] for _ in range(int(np.prod(SHAPES[name])))]
    for device, one in enumerate(updates):
        for index, value in zip(one.channels.indices[name].flat, one.delta[name].flat, strict=True):
            found[index].append((device, float(value)))
    return found


def slow_trimmed(values, hostile):
    values = sorted(values)
    while hostile and len(values) > 2:
        values, hostile = values[1:-1], hostile - 1
    return sum(values) / len(values)


def slow_neighbours(updates, hostile):
    """Device -> those that it mixes with, by mean squared distance over shared parameters."""
    held = [
        {
            (name, i): float(v)
            for name in PARAMETERS
            for i, v in zip(u.channels.indices[name].flat, u.delta[name].flat, strict=True)
        }
        for u in updates
    ]

    def distance(a, b):
        if a == b:
            return -1.0
        shared = held[a].keys() & held[b].keys()
        return sum((held[a][key] - held[b][key]) ** 2 for key in shared) / len(shared) if shared else np.inf

    everybody, n_mixed = range(len(updates)), len(updates) - hostile
    return {
        a: [b for b in sorted(everybody, key=lambda b: distance(a, b))[:n_mixed] if distance(a, b) < np.inf]
        for a in everybody
    }


def slow_merge(updates, rule, hostile):
    """Entry by entry."""
    result = global_model()
    neighbours = slow_neighbours(updates, hostile) if rule == "monna" else {}
    for name, tensor in result.items():
        for position, values in enumerate(sent(updates, name)):
            if not values or tensor.dtype == np.bool_:
                continue
            if rule == "monna":
                near = [[v for other, v in values if other in neighbours[device]] for device, _ in values]
                values = [(device, sum(v) / len(v)) for (device, _), v in zip(values, near, strict=True)]
            step = slow_trimmed([v for _, v in values], len(updates) if rule == "median" else hostile)
            tensor.reshape(-1)[position] += round(step) if tensor.dtype == np.int64 else step
    return result


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "monna"])
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, n_devices=st.integers(1, 7), hostile=st.integers(0, 3))
def test_equals_a_slow_reference_whatever_the_variants(rule, seed, n_devices, hostile):
    updates = cohort(seed, n_devices)
    f = min(hostile, (n_devices - 1) // 2)
    assert_close(merged(updates, rule=rule, hostile=hostile), slow_merge(updates, rule, f))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, n_devices=st.integers(1, 6))
@example(seed=14, n_devices=5)  # two devices share no entry with a third
def test_the_order_does_not_matter_and_arguments_are_left_alone(rule, seed, n_devices):
    updates, tensors = cohort(seed, n_devices), global_model()
    assert_close(merged(updates, tensors, rule=rule), merged(reversed(updates), tensors, rule=rule), 1e-4)
    assert_close(tensors, global_model(), 0)


@pytest.mark.parametrize("rule", RULES)
def test_equal_updates_move_by_that_update_and_nobody_moves_nothing(rule):
    one = cohort(1, 1)[0]
    after = one.channels.gather(merged([one] * 5, rule=rule))
    for name, start in one.channels.gather(global_model()).items():
        if start.dtype == np.float32:
            np.testing.assert_allclose(after[name], start + one.delta[name], rtol=1e-5, atol=1e-5)
    assert_close(merged([], rule=rule), global_model(), 0)
    assert_close(merged([one], rule=rule), merge(global_model(), [one]))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n_devices=st.integers(1, 6))
@example(seed=14, n_devices=5)  # variants that share nothing: they do not mix their statistics
def test_with_nobody_hostile_it_is_the_mean_of_equal_votes(seed, n_devices):
    updates = [replace(one, weight=1.0) for one in cohort(seed, n_devices)]
    mean = merge(global_model(), updates)
    assert_close(merged(updates, rule="trimmed_mean", hostile=0), mean)
    mixed = merged(updates, rule="monna", hostile=0)
    assert_close({name: mixed[name] for name in PARAMETERS}, {name: mean[name] for name in PARAMETERS})
    alike = [replace(one, weight=1.0) for one in cohort(seed, n_devices, lambda _: whole_map())]
    assert_close(merged(alike, rule="monna", hostile=0), merge(global_model(), alike))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, n_devices=st.integers(1, 6))
def test_flag_with_all_dimensions_and_equal_lengths_is_the_mean(seed, n_devices):
    updates = []
    for one in cohort(seed, n_devices, lambda _: whole_map()):
        length = np.sqrt(sum(np.square(one.delta[name]).sum() for name in PARAMETERS))
        delta = one.delta | {name: one.delta[name] / length for name in PARAMETERS}
        updates.append(replace(one, delta=delta, weight=1.0))
    after, mean = merged(updates, rule="flag", subspace=n_devices), merge(global_model(), updates)
    for name in PARAMETERS:
        np.testing.assert_allclose(after[name], mean[name], atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [("trimmed_mean", [1e-3, 1.0, 1e30]), ("median", [1e-3, 1.0, 1e30]), ("monna", [1e4, 1e30])],
)  # what is near enough to be mixed in by MoNNA, it bounds by how near that is
@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=SEEDS, n_devices=st.integers(3, 9), together=st.booleans())
def test_a_minority_cannot_move_an_entry_out_of_the_honest_range(rule, sizes, data, seed, n_devices, together):
    size = data.draw(st.sampled_from(sizes))
    rng = np.random.default_rng(seed)
    hostile = (n_devices - 1) // 2
    updates = cohort(seed, n_devices, lambda _: whole_map())
    shared = {name: rng.normal(size=SHAPES[name]) for name in PARAMETERS}
    for k in range(hostile):
        lie = {name: shared[name] if together else rng.normal(size=SHAPES[name]) for name in PARAMETERS}
        lie = {name: (values * size).astype(np.float32) for name, values in lie.items()}
        updates[k] = replace(updates[k], delta=updates[k].delta | lie, weight=1e9)
    zeros = global_model() | {name: np.zeros(SHAPES[name], np.float32) for name in PARAMETERS}
    after = merged(rng.permuted(updates).tolist(), zeros, rule=rule, hostile=hostile)
    honest = np.array([np.concatenate([u.delta[n].ravel() for n in PARAMETERS]) for u in updates[hostile:]])
    moved = np.concatenate([after[name].ravel() for name in PARAMETERS])
    assert (honest.min(0) - 1e-4 <= moved).all()
    assert (moved <= honest.max(0) + 1e-4).all()


def test_few_holders_are_trimmed_as_far_as_something_remains():
    values = np.array([[1.0, 1.0, 1.0, np.nan], [2.0, 2.0, np.nan, np.nan], [9.0, np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(trimmed_mean(values, hostile=5), [2.0, 1.5, 1.0, np.nan])
    np.testing.assert_allclose(trimmed_mean(values, hostile=0), [4.0, 1.5, 1.0, np.nan])
    np.testing.assert_allclose(median(np.arange(8.0).reshape(4, 2)), [3.0, 4.0])


def test_neighbours_include_oneself_and_leave_the_far_ones_out():
    points = np.array([0.0, 0.1, 0.2, 50.0, 60.0])
    neighbours = nearest(np.square(points[:, None] - points), hostile=2)
    assert neighbours.diagonal().all()
    assert (neighbours.sum(1) == 3).all()
    assert not neighbours[:3, 3:].any()
    copies = nearest(np.zeros((4, 4)), hostile=3)
    np.testing.assert_array_equal(copies, np.eye(4, dtype=bool))
    apart = np.full((4, 4), np.inf)
    np.fill_diagonal(apart, 0.0)
    np.testing.assert_array_equal(nearest(apart, hostile=1), np.eye(4, dtype=bool))  # who shares nothing is not near
    values = points[:, None]
    np.testing.assert_allclose(mixed_trimmed_mean(values, neighbours, 2), [0.1], atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, n_devices=st.integers(2, 6))
def test_flag_from_inner_products_is_flag_from_vectors(seed, n_devices):
    """The paper's iteration on the vectors themselves."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n_devices, 40)) + rng.normal(size=40)
    m = n_devices // 2 + 1
    lengths = np.linalg.norm(vectors, axis=1)
    units = (vectors / lengths[:, None]).T
    weights = np.ones(n_devices)
    for _ in range(flag.MAX_ITERATIONS):
        basis = np.linalg.svd(units * np.sqrt(weights), full_matrices=False)[0][:, :m]
        weights = 1 / np.sqrt(np.maximum(1 - np.square(basis.T @ units).sum(0), 0) + 1e-7)
    expected = basis @ basis.T @ units @ np.minimum(lengths, np.median(lengths)) / n_devices
    multipliers = flag.factors(vectors @ vectors.T, np.full(n_devices, 40.0), m)
    np.testing.assert_allclose(flag.combine(vectors, multipliers), expected, rtol=1e-5, atol=1e-7)


def test_flag_is_not_moved_by_length_and_takes_out_what_only_one_device_says():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    honest = truth + 0.3 * rng.normal(size=(7, 200))
    noise = rng.normal(size=(1, 200))

    def step(vectors, m):
        return flag.combine(vectors, flag.factors(vectors @ vectors.T, np.full(len(vectors), 200.0), m))

    quiet, loud = (step(np.concatenate([honest, scale * noise]), 1) for scale in (10.0, 1e6))
    np.testing.assert_allclose(quiet, loud, rtol=1e-6)
    assert np.linalg.norm(loud - 7 / 8 * truth) < 0.3 * np.linalg.norm(truth)
    still = np.concatenate([honest, np.zeros((1, 200))])  # learned nothing: length 0, and no division by it
    assert np.isfinite(step(still, 4)).all()


def test_geometry_counts_what_two_variants_share():
    updates = cohort(3, 4)
    with UpdateStack(global_model(), updates, slab_bytes=64) as stack:
        geometry = measure(stack, PARAMETERS)
    for a, one in enumerate(updates):
        for b, other in enumerate(updates):
            pairs = [
                (dict(mine)[device], dict(mine)[b])
                for name in PARAMETERS
                for mine in sent(updates, name)
                for device, _ in mine
                if device == a and b in dict(mine)
            ]
            assert geometry.n_shared[a, b] == len(pairs), (one.device, other.device)
            assert geometry.products[a, b] == pytest.approx(sum(x * y for x, y in pairs), abs=1e-5)
            expected = sum((x - y) ** 2 for x, y in pairs) / len(pairs) if pairs else np.inf
            assert geometry.mean_square_distances[a, b] == pytest.approx(expected, abs=1e-5)


def test_slabs_of_any_size_give_the_same_entries():
    updates, tensors = cohort(5, 3), global_model()
    for slab_bytes in (1, 100, 1 << 20):
        with UpdateStack(tensors, updates, slab_bytes=slab_bytes) as stack:
            for name in stack.names:
                found = np.concatenate([values for _, values in stack.slabs(name)], axis=1)
                expected = np.full(found.shape, np.nan)
                for device, one in enumerate(updates):
                    expected[device, one.channels.indices[name].ravel()] = one.delta[name].ravel()
                np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_statistics_stay_between_what_devices_measured_and_counters_stay_whole(rule):
    updates = cohort(4, 5, lambda _: whole_map())
    after = merged(updates, rule=rule, hostile=2)
    steps = np.array([one.delta["bn.running_var"] for one in updates])
    moved = after["bn.running_var"] - global_model()["bn.running_var"]
    assert ((steps.min(0) - 1e-5 <= moved) & (moved <= steps.max(0) + 1e-5)).all()
    assert after["bn.num_batches_tracked"].dtype == np.int64
    counts = [int(one.delta["bn.num_batches_tracked"]) for one in updates]
    assert min(counts) <= after["bn.num_batches_tracked"] - 10 <= max(counts)
    np.testing.assert_array_equal(after["mask"], global_model()["mask"])


@pytest.mark.parametrize("rule", RULES)
def test_an_update_that_does_not_fit_is_refused_by_the_device_s_name(rule):
    one = cohort(0, 1)[0]
    odd = replace(one, device="pi", delta=one.delta | {"odd": np.full((3, 2), np.nan, np.float32)})
    with pytest.raises(FederationError, match=r"'pi'.*not finite"):
        merged([one, odd], rule=rule)


def test_hostile_is_a_number_or_a_share_and_always_a_minority():
    assert [AggregationSettings(hostile=0.2).n_hostile(n) for n in (1, 2, 3, 5, 10, 11, 15)] == [0, 0, 1, 1, 2, 3, 3]
    assert [AggregationSettings(hostile=3).n_hostile(n) for n in (1, 4, 6, 7, 100)] == [0, 1, 2, 3, 3]
    assert [AggregationSettings().n_dimensions(n) for n in (1, 2, 9, 10)] == [1, 2, 5, 6]
    assert AggregationSettings(subspace=3).n_dimensions(2) == 2


def federation(tmp_path, aggregation):
    path = tmp_path / "federation.toml"
    path.write_text(
        'federation = "f"\n[model]\nname = "mlp"\ninput_shape = [3]\nn_outputs = 2\n[distillation]\nepochs = 0\n'
        f"[aggregation]\n{aggregation}\n"
    )
    return load_federation(path)


def test_the_rule_is_read_from_the_file_and_may_change_within_a_run(tmp_path):
    mean, robust = federation(tmp_path, ""), federation(tmp_path, 'rule = "monna"\nhostile = 3')
    assert mean.aggregation == AggregationSettings()
    assert robust.aggregation == AggregationSettings(rule="monna", hostile=3)
    assert run_digest(mean) == run_digest(robust)
    for wrong in ("hostile = 0.5", "hostile = -1", 'rule = "krum"', "subspace = 0"):
        with pytest.raises(ConfigError, match="aggregation"):
            federation(tmp_path, wrong)
