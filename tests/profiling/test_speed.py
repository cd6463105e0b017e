"""Rates from timed steps: exact where the steps tell, sensible where they do not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.profiling.speed import Speed, TimedStep, fit_speed

STEPS = ((2.8e9, 1.0e9, 443), (2.0e8, 2.7e8, 443), (3.6e8, 1.5e8, 443), (2.6e7, 3.5e7, 443))
"""About what the reference steps count."""

SPEEDS = st.builds(
    Speed,
    product_flops_per_s=st.floats(1e9, 1e12),
    moved_bytes_per_s=st.floats(1e9, 1e11),
    call_s=st.floats(1e-7, 1e-4),
)


def timed(speed: Speed, counts: tuple[float, float, float], noise: float = 1.0) -> TimedStep:
    flops, moved, calls = counts
    seconds = noise * speed.seconds(product_flops=flops, moved_bytes=moved, calls=calls)
    return TimedStep(product_flops=flops, moved_bytes=moved, calls=calls, seconds=seconds)


def error(speed: Speed, step: TimedStep) -> float:
    seconds = speed.seconds(product_flops=step.product_flops, moved_bytes=step.moved_bytes, calls=step.calls)
    return abs(seconds / step.seconds - 1)


@given(speed=SPEEDS, slower=st.floats(0.1, 30))
@settings(deadline=None)
def test_what_is_expected_is_found_again_at_any_pace(speed: Speed, slower: float) -> None:
    found = fit_speed([timed(speed.slowed(slower), counts) for counts in STEPS], speed)
    wanted = speed.slowed(slower)
    assert found.product_flops_per_s == pytest.approx(wanted.product_flops_per_s, rel=1e-6)
    assert found.moved_bytes_per_s == pytest.approx(wanted.moved_bytes_per_s, rel=1e-6)
    assert found.call_s == pytest.approx(wanted.call_s, rel=1e-6)


@given(speed=SPEEDS, share=st.tuples(*[st.floats(0.4, 2.5)] * 3))
@settings(deadline=None)
def test_a_device_unlike_what_is_expected_is_told_by_its_steps(speed: Speed, share: tuple[float, float, float]) -> None:
    real = Speed(
        product_flops_per_s=speed.product_flops_per_s * share[0],
        moved_bytes_per_s=speed.moved_bytes_per_s * share[1],
        call_s=speed.call_s * share[2],
    )
    steps = [timed(real, counts) for counts in STEPS]
    found = fit_speed(steps, speed)
    assert max(error(found, step) for step in steps) < 0.1


@given(speed=SPEEDS, noise=st.lists(st.floats(0.02, 50), min_size=4, max_size=4))
@settings(deadline=None)
def test_rates_are_positive_and_finite_whatever_was_measured(speed: Speed, noise: list[float]) -> None:
    found = fit_speed([timed(speed, counts, n) for counts, n in zip(STEPS, noise, strict=True)], speed)
    assert 0 < found.product_flops_per_s < 1e17
    assert 0 < found.moved_bytes_per_s < 1e16
    assert 0 < found.call_s < 1
