"""Screening: a minority can neither shout down the others nor make honest devices look odd."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.coordinator import screening
from reft_edge.coordinator.screening import FREE_FACTOR, MAX_WEIGHT_FACTOR, MIN_COHORT, UpdateLength, bounded_weights

length_st = st.floats(min_value=1e-9, max_value=1e30)
lengths_st = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), length_st, max_size=20)
samples_st = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 2**53), max_size=20)


def named(*values):
    return {f"d{index}": value for index, value in enumerate(values)}


def outliers(norms):
    """Of devices that all train the same variant."""
    return screening.outliers({device: UpdateLength(norm, 1000) for device, norm in norms.items()})


@given(lengths_st)
def test_at_most_half_are_outliers_and_the_shorter_half_never_is(lengths):
    found = outliers(lengths)
    ordered = sorted(lengths.values())
    assert 2 * len(found) <= len(lengths)
    assert all(lengths[device] > ordered[(len(ordered) - 1) // 2] for device in found)


@given(lengths_st)
def test_the_order_of_devices_does_not_matter(lengths):
    assert outliers({device: lengths[device] for device in sorted(lengths, reverse=True)}) == outliers(lengths)


@given(st.lists(st.floats(min_value=1.0, max_value=FREE_FACTOR * 0.999), min_size=MIN_COHORT, max_size=12))
def test_devices_within_the_free_factor_are_never_outliers(values):
    assert outliers(named(*values)) == {}


@pytest.mark.parametrize("factor", [10.0, 1e3, 1e6, 1e30])
def test_two_of_ten_that_scale_their_updates_are_found(factor):
    honest = [0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4]
    assert outliers(named(*honest, factor, 2 * factor)).keys() == {"d8", "d9"}


def test_an_uneven_fleet_is_judged_by_its_own_spread():
    """Lengths of ten honest devices with 16 to 600 samples, as measured on digits: the longest is 11 medians."""
    uneven = [0.09, 0.16, 0.3, 0.55, 0.8, 1.2, 2.3, 4.1, 7.0, 10.8]
    assert outliers(named(*uneven)) == {}
    assert outliers(named(*uneven, 1e4)).keys() == {"d10"}


@pytest.mark.parametrize("n_parameters", [70, 14_000])
def test_a_variant_of_another_size_is_judged_by_the_kinder_measure(n_parameters):
    """A narrow variant is long for each parameter, a large one in all, and neither is a fault of its device."""
    cohort = {f"d{index}": UpdateLength(1.0 + index / 10, 1000) for index in range(4)}
    honest = UpdateLength(1.4 * max(1.0, (n_parameters / 1000) ** 0.5), n_parameters)
    assert screening.outliers({**cohort, "odd": honest}) == {}
    assert screening.outliers({**cohort, "odd": UpdateLength(20 * honest.norm, n_parameters)}).keys() == {"odd"}


def test_two_updates_have_no_majority():
    assert outliers(named(1.0, 1e9)) == {}


@given(samples_st)
def test_nobody_counts_more_than_it_says_nor_than_the_bound(samples):
    weights = bounded_weights(samples)
    assert weights.keys() == samples.keys()
    assert all(0 < weights[device] <= samples[device] for device in samples)
    half = sum(weights[device] == samples[device] for device in samples)
    assert 2 * half >= len(samples)  # the smaller half is as it said


@given(st.lists(st.integers(100, int(100 * MAX_WEIGHT_FACTOR)), min_size=1, max_size=9))
def test_an_even_fleet_is_weighted_by_its_samples(counts):
    assert bounded_weights(named(*counts)) == named(*map(float, counts))


@pytest.mark.parametrize("lie", [10**4, 10**9, 2**53])
def test_a_lie_has_a_quarter_of_the_say_among_ten(lie):
    weights = bounded_weights(named(*[100] * 9, lie))
    assert weights["d9"] / sum(weights.values()) == 0.25


def test_of_two_devices_the_smaller_sets_the_bound():
    assert bounded_weights({"a": 10, "b": 10**6}) == {"a": 10.0, "b": 30.0}
