"""The estimate of a sustained rate, on synthetic timings: no real clock takes part."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from reft_edge.profiling.sustained import Rate, Repetition, summarize, sustained_rate, sustained_rates


class Machine:
    """A clock that each run advances by the next duration."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.now = 0.0
        self.durations = durations

    def clock(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += next(self.durations)

    def rate(self, repetition: Repetition | None = None) -> Rate:
        return sustained_rate(self.run, work=100.0, repetition=repetition, clock=self.clock)


def constant(duration: float) -> Iterator[float]:
    while True:
        yield duration


def busy(seed: int, *, share: float) -> Iterator[float]:
    """10 ms runs; spells of half a second, `share` of them on a machine that gives half its time to others."""
    rng = random.Random(seed)
    while True:
        slow = rng.random() < share
        for _ in range(rng.randint(20, 60)):
            yield 0.010 * (1 + rng.random() * 0.02) * (2.0 if slow else 1.0)


def test_a_quiet_machine_is_stable_after_the_fewest_batches() -> None:
    rate = Machine(constant(0.01)).rate()
    assert rate.per_s == pytest.approx(10_000)
    assert (rate.stable, rate.n_batches, rate.slowed) == (True, 8, False)
    assert rate.spread == pytest.approx(0, abs=1e-9)
    assert rate.busy == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_two_runs_on_a_machine_that_others_slow_down_agree_within_a_tenth(share: float) -> None:
    rates = [Machine(busy(seed, share=share)).rate(Repetition(min_s=6, max_s=20)).per_s for seed in range(20)]
    assert max(rates) / min(rates) < 1.1
    assert all(9_000 < rate < 10_100 for rate in rates)


def test_one_lucky_run_does_not_count() -> None:
    durations = iter([0.01] * 70 + [0.001] + [0.01] * 10_000)
    assert Machine(durations).rate().per_s == pytest.approx(10_000)


def test_a_board_that_throttles_as_it_warms_up_is_slower_in_the_later_half() -> None:
    rate = summarize([100.0] * 10 + [50.0] * 10, Repetition())
    assert (rate.per_s, rate.late_per_s, rate.slowed) == (100.0, 50.0, True)


def test_a_run_longer_than_all_the_time_is_made_once_after_the_warm_up() -> None:
    machine = Machine(constant(60.0))
    rate = machine.rate(Repetition(max_s=5))
    assert (rate.n_batches, rate.stable, machine.now) == (1, False, 120.0)


def test_time_is_a_bound_when_nothing_agrees() -> None:
    rng = random.Random(1)
    machine = Machine(iter([0.01 * (1 + 3 * rng.random()) for _ in range(100_000)]))
    rate = machine.rate(Repetition(batch_s=0.01, max_s=3, spread=0.0001))
    assert not rate.stable
    assert machine.now < 3.2


def test_a_clock_that_stands_still_gives_a_finite_rate() -> None:
    ticks = iter([0.0] * 6 + [float(second) for second in range(1, 1000)])
    assert sustained_rate(lambda: None, work=1.0, repetition=Repetition(), clock=lambda: next(ticks)).per_s < 1e12


def test_jobs_that_take_turns_are_disturbed_alike() -> None:
    """A machine that becomes ten times slower half way: both jobs keep their ratio."""
    now = 0.0

    def run(duration: float) -> None:
        nonlocal now
        now += duration * (10 if now > 2 else 1)

    one, other = sustained_rates(
        [(lambda: run(0.01), 100.0), (lambda: run(0.03), 100.0)], repetition=Repetition(min_s=5), clock=lambda: now
    )
    assert one.per_s / other.per_s == pytest.approx(3)


def test_pauses_between_runs_count_where_a_quota_makes_them() -> None:
    """One run in ten is interrupted for as long as ten take: half of the time is gone, which no median of runs says."""
    durations = [0.01] * 9 + [0.11]
    quota = Machine(iter(durations * 10_000)).rate(Repetition(batch_s=0.5, whole_batches=True))
    assert quota.per_s == pytest.approx(5_000, rel=0.1)
    assert Machine(iter(durations * 10_000)).rate().per_s == pytest.approx(10_000)
