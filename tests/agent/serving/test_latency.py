"""Percentiles are those of the runs that were counted, and repeating ends by count or by time."""

from __future__ import annotations

import itertools

import pytest

from reft_edge.agent.serving.latency import Effort, Latency, measure_latency, percentile, summary


class Clock:
    """Moves on by what each run takes."""

    def __init__(self, *durations_s: float) -> None:
        self.now_s = 0.0
        self.runs = 0
        self._durations = itertools.chain(durations_s, itertools.repeat(durations_s[-1]))

    def __call__(self) -> float:
        return self.now_s

    def run(self) -> None:
        self.runs += 1
        self.now_s += next(self._durations)


def test_percentiles_are_of_the_nearest_rank():
    values = [float(value) for value in range(1, 201)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [100, 190, 198, 200]
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0


def test_one_slow_run_in_twenty_shows_in_the_tail_only():
    found = summary([0.01] * 94 + [0.5] * 6)
    assert (found.p50_s, found.p95_s, found.p99_s, found.runs) == (0.01, 0.5, 0.5, 100)


def test_the_warm_up_does_not_count():
    clock = Clock(9.0, 9.0, 0.25)
    effort = Effort(runs=4, max_s=100, warm_up_runs=2, warm_up_max_s=100)
    found = measure_latency(clock.run, n_samples=8, effort=effort, clock=clock)
    assert found == Latency(p50_s=0.25, p95_s=0.25, p99_s=0.25, per_s=32, runs=4)


@pytest.mark.parametrize(("duration_s", "runs"), [(0.25, 8), (1.0, 2), (60.0, 1)])
def test_time_ends_it_but_not_before_the_first_run(duration_s: float, runs: int):
    clock = Clock(duration_s)
    effort = Effort(runs=1000, max_s=2.0, warm_up_runs=3, warm_up_max_s=0.1)
    found = measure_latency(clock.run, effort=effort, clock=clock)
    assert (found.runs, clock.runs) == (runs, runs + 1)
    assert found.p50_s == duration_s


def test_a_clock_that_stands_still_is_no_division_by_zero():
    assert summary([0.0]).per_s > 0
