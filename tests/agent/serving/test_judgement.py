"""Which file may serve: the rules of a deployment, one by one and against each other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.agent.serving.judgement import NotTaken, Taken, judge, objection
from reft_edge.wire.deployment import Health, HealthRules, Precision

RULES = HealthRules()


def health(precision: Precision = "float32", **other: Any) -> Health:
    figures = {"holdout_samples": 120, "metric": 0.9, "metric_before": 0.9, **other}
    latency_s = figures.pop("latency_s", 0.010)
    return Health(
        precision=precision,
        latency_p50_s=latency_s,
        latency_p95_s=2 * latency_s,
        latency_p99_s=3 * latency_s,
        **{"peak_memory_bytes": 80 * 2**20, **figures},
    )


def int8(**other: Any) -> Health:
    return health("int8", **{"latency_s": 0.004, **other})


def verdict(*measured: Health, accuracy: bool = True, **rules: Any) -> Taken | NotTaken:
    tests = rules.pop("test_metrics", None)
    return judge(measured, HealthRules(**rules), accuracy=accuracy, test_metrics=tests)


@pytest.mark.parametrize(
    ("figures", "rules", "reason"),
    [
        (
            {"metric": 0.61, "metric_before": 0.93},
            {},
            "accuracy 0.61 on 120 held out samples, 0.93 of what is served now; max_metric_drop is 0.05",
        ),
        (
            {"metric": 0.61, "metric_before": None},
            {"min_accuracy": 0.8},
            "accuracy 0.61 on 120 held out samples; min_accuracy is 0.8",
        ),
        ({"metric": None}, {}, "its answers on 120 held out samples are not all numbers"),
        ({}, {"max_latency_s": 0.015}, "95 of 100 single samples take up to 20 ms; max_latency_s is 0.015"),
        ({}, {"max_memory_bytes": 2**26}, "predicting takes 80 MiB; max_memory_bytes is 67108864 (64 MiB)"),
    ],
)
def test_a_broken_rule_is_told_with_its_figures(figures: dict[str, Any], rules: dict[str, Any], reason: str) -> None:
    answer = verdict(health(**figures), **rules)
    assert isinstance(answer, NotTaken)
    assert answer.reason == reason


def test_a_drop_as_large_as_allowed_is_allowed() -> None:
    assert verdict(health(metric=0.88, metric_before=0.93)) == Taken(precision="float32")
    assert verdict(health(metric=0.8, metric_before=None), min_accuracy=0.8) == Taken(precision="float32")
    assert isinstance(verdict(health(metric=0.8799, metric_before=0.93)), NotTaken)


def test_an_error_may_be_above_by_a_share() -> None:
    assert verdict(health(metric=2.1, metric_before=2.0), accuracy=False) == Taken(precision="float32")
    answer = verdict(health(metric=2.2, metric_before=2.0), accuracy=False)
    assert isinstance(answer, NotTaken)
    assert answer.reason.startswith("mean squared error 2.2 on 120 held out samples, 2 of what is served now")
    assert verdict(health(metric=9.0, metric_before=None), accuracy=False, min_accuracy=1.0) == Taken(
        precision="float32"
    )
    assert isinstance(verdict(health(metric=0.1, metric_before=0.0), accuracy=False), NotTaken)


def test_few_samples_say_nothing_about_accuracy() -> None:
    few = health(holdout_samples=9, metric=0.1, metric_before=1.0)
    assert verdict(few, min_accuracy=0.9) == Taken(precision="float32")
    assert isinstance(verdict(few, min_holdout_samples=9), NotTaken)
    assert verdict(health(holdout_samples=0, metric=None)) == Taken(precision="float32")
    assert isinstance(verdict(health(holdout_samples=3, metric=None)), NotTaken)


@pytest.mark.parametrize(
    ("small", "rules", "taken"),
    [
        (int8(), {}, "int8"),
        (int8(metric=0.891), {}, "int8"),
        (int8(metric=0.889), {}, "float32"),
        (int8(metric=0.889), {"max_int8_drop": 0.02}, "int8"),
        (int8(latency_s=0.010), {}, "float32"),  # no faster
        (int8(latency_s=0.010), {"max_memory_bytes": 2**26}, "float32 none"),
        (int8(latency_s=0.010, peak_memory_bytes=2**25), {"max_memory_bytes": 2**26}, "int8"),  # no faster, but it fits
        (int8(holdout_samples=5), {}, "float32"),  # nobody knows how good it is
        (int8(holdout_samples=5), {"test_metrics": {"float32": 0.8, "int8": 0.8}}, "int8"),
        (int8(holdout_samples=5), {"test_metrics": {"float32": 0.8, "int8": 0.7}}, "float32"),
        (int8(holdout_samples=5), {"test_metrics": {"float32": 0.8, "int8": None}}, "float32"),
    ],
)
def test_int8_is_taken_where_it_gains_time_or_fits_and_loses_next_to_nothing(
    small: Health, rules: dict[str, Any], taken: str
) -> None:
    full = health(holdout_samples=small.holdout_samples)
    answer = verdict(full, small, **rules)
    assert verdict(small, full, **rules) == answer
    if taken.endswith("none"):
        assert isinstance(answer, NotTaken)
    else:
        assert answer == Taken(precision=taken)


def test_a_fast_int8_that_lost_too_much_does_not_stand_in_for_a_slow_float32() -> None:
    answer = verdict(health(), int8(metric=0.86), max_latency_s=0.01)
    assert isinstance(answer, NotTaken)
    assert answer.kind == "latency"
    assert answer.reason == (
        "float32: 95 of 100 single samples take up to 20 ms; max_latency_s is 0.01; "
        "int8 is 0.04 below; max_int8_drop is 0.01"
    )
    unknown = verdict(health(holdout_samples=0, metric=None), int8(holdout_samples=0, metric=None), max_latency_s=0.01)
    assert isinstance(unknown, NotTaken)
    assert unknown.reason.endswith("int8 cannot be compared")


figures = st.fixed_dictionaries(
    {
        "holdout_samples": st.sampled_from([0, 5, 120]),
        "metric": st.none() | st.floats(0, 1),
        "metric_before": st.none() | st.floats(0, 1),
        "latency_s": st.floats(1e-4, 1.0),
        "peak_memory_bytes": st.integers(2**20, 2**30),
    }
)
rules = st.builds(
    HealthRules,
    max_metric_drop=st.floats(0, 1),
    min_accuracy=st.none() | st.floats(0, 1),
    max_int8_drop=st.floats(0, 1),
    max_latency_s=st.none() | st.floats(0, 2),
    max_memory_bytes=st.none() | st.integers(0, 2**31),
    min_holdout_samples=st.integers(0, 200),
)


@given(figures, figures, rules, st.booleans())
def test_what_is_taken_breaks_no_rule(
    full: dict[str, Any], small: dict[str, Any], asked: HealthRules, accuracy: bool
) -> None:
    measured = {"float32": health("float32", **full), "int8": health("int8", **small)}
    answer = judge(tuple(measured.values()), asked, accuracy=accuracy)
    if isinstance(answer, Taken):
        assert objection(measured[answer.precision], asked, accuracy=accuracy) is None
    else:
        assert objection(measured["float32"], asked, accuracy=accuracy) is not None
