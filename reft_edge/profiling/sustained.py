"""A rate that a device sustains, from repeated runs on a machine that may be busy with something else.

Other processes, interrupts and a neighbour on the same host can only make a run slower, never faster; so the mean and
the median of all runs tell how busy the machine was, and the upper end tells what it can do. One lucky run must not
count either. Therefore runs are grouped into batches of about a quarter of a second, a batch's rate is the median of
its runs, and the result is the median of the best quarter of the batches. Batches are added for a least time, because a
spell of something else may take the first seconds whole, and then until the best quarter agrees within a bound or the
time is spent. The same figure of the later half is kept too: a board that throttles as it warms up is slower there.

Nothing here reads a clock but through the `clock` argument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """How long to repeat."""

    batch_s: float = 0.25
    """A batch ends after this time, or after one run if that takes longer."""
    min_batches: int = 8
    """Fewer make the best quarter one batch, which agrees with itself."""
    min_s: float = 2.0
    max_s: float = 10.0
    warm_up_s: float = 0.5
    """Run without counting: caches and allocator fill, the clock governor reaches its top."""
    whole_batches: bool = False
    """Whether a batch's rate is its work over its time, and not the median of its runs: where a quota makes pauses that
    fall between runs, they count. Give batches of several of the quota's periods, a tenth of a second each, then."""
    spread: float = 0.03
    """Stop when the best quarter of the batches agrees within this share."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Work done in a second, and how far to trust it."""

    per_s: float
    """Median of the best quarter of the batches."""
    spread: float
    """(highest - lowest) / highest of that quarter."""
    busy: float
    """Share by which the median of all batches stays below `per_s`: what something else took, or noise."""
    late_per_s: float
    """`per_s` of the later half of the batches: below it when the board throttles as it warms up."""
    n_batches: int
    stable: bool
    """Whether the best quarter agreed within the bound before the time was spent."""

    @property
    def slowed(self) -> bool:
        """Whether the later half was more than a tenth slower."""
        return self.late_per_s < 0.9 * self.per_s


def sustained_rate(
    run: Callable[[], object],
    *,
    work: float,
    repetition: Repetition | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """Repeat `run`, each time doing `work` units, until the rate is stable or the time is spent.

    At least one warm-up run and one batch are made, however long they take.
    """
    return sustained_rates([(run, work)], repetition=repetition, clock=clock)[0]


def sustained_rates(
    jobs: Sequence[tuple[Callable[[], object], float]],
    *,
    repetition: Repetition | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Rate, ...]:
    """The same for several jobs (run, work) that take turns, batch by batch, until all of them are stable.

    What is compared with each other must be measured under the same disturbances.
    """
    limits = repetition or Repetition()
    start = clock()
    for run, _ in jobs:
        _batch(run, limits.warm_up_s / len(jobs), clock)
    rates: list[list[float]] = [[] for _ in jobs]
    while True:
        for (run, work), found in zip(jobs, rates, strict=True):
            durations = _batch(run, limits.batch_s, clock)
            found.append(work / (fmean(durations) if limits.whole_batches else median(durations)))
        results = tuple(summarize(found, limits) for found in rates)
        spent = clock() - start
        if spent >= limits.max_s or (all(rate.stable for rate in results) and spent >= limits.min_s):
            return results


def summarize(rates: Sequence[float], limits: Repetition) -> Rate:
    """The `Rate` of batches in the order in which they were run; `rates` must not be empty."""
    best = _best_quarter(rates)
    value = median(best)
    spread = (best[0] - best[-1]) / best[0]
    return Rate(
        per_s=value,
        spread=spread,
        busy=max(0.0, 1 - median(rates) / value),
        late_per_s=median(_best_quarter(rates[len(rates) // 2 :])),
        n_batches=len(rates),
        stable=len(rates) >= limits.min_batches and spread <= limits.spread,
    )


def _best_quarter(rates: Sequence[float]) -> list[float]:
    """The highest quarter, rounded up, highest first."""
    return sorted(rates, reverse=True)[: (len(rates) + 3) // 4]


def _batch(run: Callable[[], object], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Durations of runs made one after another for at least `seconds`."""
    durations: list[float] = []
    start = before = clock()
    while not durations or before - start < seconds:
        run()
        after = clock()
        # A clock that did not advance would make an infinite rate; its resolution is the honest bound.
        durations.append(max(after - before, 1e-9))
        before = after
    return durations
