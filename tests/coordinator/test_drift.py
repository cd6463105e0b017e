"""A device departs when it is unlike the others beyond chance and beyond what the others are unlike each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import chi2

from reft_edge.coordinator.drift import (
    MIN_DEVICES,
    MIN_PREDICTIONS,
    chi_squared_quantile,
    departures,
    jensen_shannon,
)
from reft_edge.coordinator.records import ConditionRecord
from reft_edge.wire.deployment import Condition, PredictionCounts

EVEN = (100, 100, 100, 100)
SURE = (0, 0, 0, 0, 0, 5, 10, 15, 70, 300)
UNSURE = (0, 0, 20, 80, 120, 100, 40, 20, 10, 10)


def told(
    device: str, classes: Sequence[int] = EVEN, confidence: Sequence[int] = SURE, version: str = "v1"
) -> ConditionRecord:
    counts = PredictionCounts(
        version=version, predictions=sum(classes), classes=tuple(classes), confidence=tuple(confidence)
    )
    return ConditionRecord(device=device, condition=Condition(counts=counts), seen_at=0.0)


def alike(n: int, version: str = "v1") -> list[ConditionRecord]:
    return [told(f"pi-{index}", version=version) for index in range(n)]


def drawn(rng: np.random.Generator, shares: np.ndarray, samples: np.ndarray) -> list[ConditionRecord]:
    """A fleet whose counts were drawn; `shares` (n_devices, n_classes)."""
    rows = [rng.multinomial(n, p) for n, p in zip(samples, shares, strict=True)]
    return [told(f"pi-{index}", [int(count) for count in row]) for index, row in enumerate(rows)]


def test_a_device_that_predicts_other_classes_departs_and_nobody_else_does() -> None:
    (found,) = departures([*alike(9), told("odd", (10, 10, 370, 10))])
    assert (found.device, found.version, found.aspect, found.entry) == ("odd", "v1", "classes", 2)
    assert found.usual < 0.1 < found.distance < 1
    assert found.predictions == 400
    assert found.reason == "predicts class 2 in 92% of cases, the others in 25%"
    (named,) = departures([*alike(9), told("odd", (10, 10, 370, 10))], {found.version: ("a", "b", "bent", "d")})
    assert named.reason == "predicts class bent in 92% of cases, the others in 25%"


def test_a_device_that_is_less_sure_departs_though_its_classes_do_not() -> None:
    (found,) = departures([*alike(9), told("fogged", confidence=UNSURE)])
    assert (found.device, found.aspect) == ("fogged", "confidence")
    assert found.reason == "is less sure than the others: confidence 0.50 on average, theirs 0.91"


def test_the_order_of_the_devices_does_not_matter() -> None:
    fleet = [*alike(6), told("odd", (400, 0, 0, 0)), told("odder", (0, 0, 0, 400), UNSURE)]
    assert departures(fleet) == departures(fleet[::-1])


def test_who_serves_another_version_is_no_example() -> None:
    odd = told("odd", (400, 0, 0, 0))
    assert departures([*alike(MIN_DEVICES - 1), odd])
    assert not departures([*alike(MIN_DEVICES - 1, version="v2"), odd])


def test_a_fleet_too_small_to_compare_gives_no_alarm() -> None:
    assert not departures([*alike(MIN_DEVICES - 2), told("odd", (400, 0, 0, 0))])


def test_few_predictions_give_no_alarm_and_are_no_example() -> None:
    few = told("few", (MIN_PREDICTIONS - 1, 0, 0, 0))
    assert not departures([*alike(9), few])
    assert departures([*alike(9), told("odd", (400, 0, 0, 0))]) == departures(
        [*alike(9), few, told("odd", (400, 0, 0, 0))]
    )


def test_who_tells_nothing_or_does_not_classify_is_passed_over() -> None:
    silent = ConditionRecord(device="silent", condition=Condition(), seen_at=0.0)
    assert not departures([silent, *(told(f"pump-{index}", (), ()) for index in range(9))])


def test_a_class_that_some_never_predict_may_be_left_out_by_them() -> None:
    short = [told(f"pi-{index}", (200, 200)) for index in range(9)]
    (found,) = departures([*short, told("odd", (0, 0, 0, 400))])
    assert (found.device, found.entry) == ("odd", 3)


@pytest.mark.parametrize(("n_devices", "n_classes"), [(5, 10), (20, 10), (100, 10), (20, 1000)])
def test_samples_of_one_world_are_no_alarm_however_few(n_devices: int, n_classes: int) -> None:
    """Also where most classes were never seen yet."""
    rng = np.random.default_rng(n_devices)
    shares = np.full((n_devices, n_classes), 1 / n_classes)
    alarms = sum(bool(departures(drawn(rng, shares, rng.integers(MIN_PREDICTIONS, 300, n_devices)))) for _ in range(40))
    assert alarms == 0


@pytest.mark.parametrize("concentration", [0.1, 0.3, 1.0, 10.0], ids=lambda value: f"Dirichlet({value})")
def test_a_fleet_whose_devices_all_see_something_else_is_hardly_ever_an_alarm(concentration: float) -> None:
    rng = np.random.default_rng(0)
    fleets = [
        drawn(rng, rng.dirichlet(np.full(10, concentration), size=20), rng.integers(100, 2000, 20)) for _ in range(50)
    ]
    assert sum(bool(departures(fleet)) for fleet in fleets) <= 1


def test_a_departure_shows_in_a_fleet_that_is_moderately_unlike() -> None:
    rng = np.random.default_rng(1)
    caught = 0
    for _ in range(50):
        fleet = drawn(rng, rng.dirichlet(np.full(10, 1.0), size=20), np.full(20, 1000))
        stuck = told("stuck", [0, 0, 0, 1000])
        caught += "stuck" in {one.device for one in departures([*fleet, stuck])}
    assert caught >= 45


def test_the_divergence_is_symmetric_and_between_nothing_and_everything() -> None:
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(7), size=(2, 50))
    assert np.allclose(jensen_shannon(p, q), jensen_shannon(q, p))
    assert np.allclose(jensen_shannon(p, p), 0)
    assert np.allclose(jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])), np.log(2))
    middle = (p + q) / 2
    slow = [
        sum(a * np.log(a / m) + b * np.log(b / m) for a, b, m in zip(*row, strict=True)) / 2
        for row in zip(p, q, middle, strict=True)
    ]
    assert np.allclose(jensen_shannon(p, q), slow)


@pytest.mark.parametrize("freedom", [1, 2, 9, 99])
@pytest.mark.parametrize("devices", [5, 1000])
def test_the_bound_of_chance_is_never_too_low(freedom: int, devices: int) -> None:
    exact = chi2.ppf(1 - 0.01 / devices, freedom)
    assert 1 <= chi_squared_quantile(1 - 0.01 / devices, freedom) / exact < 1.12
