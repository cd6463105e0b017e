"""How long a prediction takes: percentiles of many runs of one kind.

Timings of a board have a long tail (interrupts, the clock governor, another process), and the tail is what a user
waits for; so the percentiles are those of all runs after a warm-up, none thrown away. `profiling.sustained` asks the
other question, what the board can do at its best.

Knows no model and no onnxruntime: what is timed is a function. Loads no numpy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, fsum


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to repeat: until there are `runs`, or until `max_s` have passed; at least once."""

    runs: int = 200
    """Two of them lie above the 99th percentile."""
    max_s: float = 5.0
    warm_up_runs: int = 5
    """Run without counting: onnxruntime fills its arena, caches fill, the clock governor rises."""
    warm_up_max_s: float = 1.0
    """The warm-up of a slow model ends after this time, but not before its first run."""


QUICK = Effort(runs=100, max_s=2.0, warm_up_runs=3, warm_up_max_s=0.5)
"""For a check between other work."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of single runs, in seconds, and what they make in a row."""

    p50_s: float
    p95_s: float
    p99_s: float
    """Of fewer than 100 runs the slowest one."""
    per_s: float
    """Samples a second, one run after the other."""
    runs: int


def measure_latency(
    run: Callable[[], object],
    *,
    n_samples: int = 1,
    effort: Effort | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time `run`, which predicts `n_samples` each time, for example `lambda: model.run(sample)`."""
    wanted = effort or Effort()
    begun = clock()
    for _ in range(wanted.warm_up_runs):
        run()
        if clock() - begun >= wanted.warm_up_max_s:
            break
    times_s: list[float] = []
    begun = before = clock()
    while not times_s or (len(times_s) < wanted.runs and before - begun < wanted.max_s):
        run()
        after = clock()
        times_s.append(after - before)
        before = after
    return summary(times_s, n_samples=n_samples)


def summary(times_s: Sequence[float], *, n_samples: int = 1) -> Latency:
    """`times_s`: how long each run of `n_samples` took, at least one."""
    ordered = sorted(times_s)
    return Latency(
        p50_s=percentile(ordered, 0.50),
        p95_s=percentile(ordered, 0.95),
        p99_s=percentile(ordered, 0.99),
        per_s=n_samples * len(ordered) / max(fsum(ordered), 1e-9),  # a clock may stand still between two readings
        runs=len(ordered),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least of the `ordered` values that at least `share` of them do not exceed (nearest rank)."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]
