"""How fast a device trains: three rates, and the time of a training step that follows from them.

One figure for all models is too crude (see `reft_edge.compile.work`, which counts what these rates are for). The rates
are fitted to the times of a few reference steps. Pure; numpy is loaded only to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PRIOR_WEIGHT = 0.05
"""How much a rate's distance from what is expected counts, beside the distance of a predicted time from the measured
one. Enough to settle what the steps do not tell; a rate half or twice as expected costs less than 10% of any time."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates at which one device works through the three parts of a step."""

    product_flops_per_s: float
    """Matrix products, their padding included."""
    moved_bytes_per_s: float
    call_s: float
    """What calling one node costs, or binding one tensor."""

    def seconds(self, *, product_flops: float, moved_bytes: float, calls: float) -> float:
        return product_flops / self.product_flops_per_s + moved_bytes / self.moved_bytes_per_s + calls * self.call_s

    def slowed(self, factor: float) -> Speed:
        """The same device, taking `factor` times as long for everything."""
        return Speed(
            product_flops_per_s=self.product_flops_per_s / factor,
            moved_bytes_per_s=self.moved_bytes_per_s / factor,
            call_s=self.call_s * factor,
        )


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """A training step that was counted and timed."""

    product_flops: float
    moved_bytes: float
    calls: float
    seconds: float


def fit_speed(steps: Sequence[TimedStep], expected: Speed) -> Speed:
    """The rates that explain the steps' times best, by relative error.

    Least squares with a weak pull towards `expected` (ridge regression), so that rates stay positive and finite
    whatever was measured.
    """
    import numpy as np

    times = [
        step.seconds
        / expected.seconds(product_flops=step.product_flops, moved_bytes=step.moved_bytes, calls=step.calls)
        for step in steps
    ]
    start = expected.slowed(sorted(times)[len(times) // 2])
    # Unknowns: by how much each part takes longer than in `start`.
    parts = np.array(
        [
            (
                step.product_flops / start.product_flops_per_s / step.seconds,
                step.moved_bytes / start.moved_bytes_per_s / step.seconds,
                step.calls * start.call_s / step.seconds,
            )
            for step in steps
        ]
    )
    rows = np.concatenate([parts, PRIOR_WEIGHT * np.eye(3)])
    wanted = np.concatenate([np.ones(len(steps)), PRIOR_WEIGHT * np.ones(3)])
    factors = np.clip(np.linalg.lstsq(rows, wanted, rcond=None)[0], 0.02, 50.0)
    return Speed(
        product_flops_per_s=start.product_flops_per_s / float(factors[0]),
        moved_bytes_per_s=start.moved_bytes_per_s / float(factors[1]),
        call_s=start.call_s * float(factors[2]),
    )
