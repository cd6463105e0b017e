"""How long a device takes for the steps of a round, from what a step counts and the device's rates.

A step takes the device its own time, which a correction stretches; where its owner grants it less than it could do, the
step is followed by a pause, and takes at least the time that pacing makes of it, which nothing stretches.
"""

from __future__ import annotations

from dataclasses import dataclass

from reft_edge.bundle.manifest import Cost, Work
from reft_edge.data.dataset import n_batches
from reft_edge.profiling.profile import DeviceProfile

START_CALLS = 250_000
"""What starting a worker costs where it was not measured, in calls of a graph's nodes: 0.4 s on a laptop, 1 to 2 s on
a Raspberry Pi. The first round measures it."""

OPENING_LINEAR, OPENING_QUADRATIC = 8000, 2400
"""Calls of a graph at which opening its session takes as long as starting the worker, for what grows with the graph
and for what grows with its square (onnxruntime's optimizer). Measured from 180 to 4,600 calls."""

LOOP_CALLS = 20
"""What the loop around a step costs, in calls of a graph's nodes: drawing the batch, telling how far training is."""

LOADING_PASSES = 6
"""Bytes moved for each byte of a batch before its step: gathered, made floats, checked, taken in."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """`count` equal steps. Seconds of one of them."""

    count: int
    own_s: float
    paced_s: float
    """At least this, pauses included; 0 where the device is not paced."""

    def seconds(self, factor: float = 1.0) -> float:
        """Of all of them; `factor`: by how much the device is slower than its profile."""
        return self.count * max(self.own_s * factor, self.paced_s)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One variant on one device."""

    profile: DeviceProfile
    cost: Cost
    sample_bytes: int

    def step(self, n_samples: int) -> Steps:
        """One training step on a batch of so many samples."""
        return self._steps(self.cost.step_work, self.cost.step_flops(n_samples), n_samples)

    def epoch(self, n_samples: int, batch_size: int) -> list[Steps]:
        """The steps of an epoch: full batches, and a smaller one at the end."""
        n_steps, n_full = n_batches(n_samples, batch_size), n_samples // batch_size
        epoch = [self._times(self.step(batch_size), n_full)] if n_full else []
        return [*epoch, self.step(n_samples - n_full * batch_size)] if n_steps > n_full else epoch

    def evaluation(self, n_samples: int, batch_size: int) -> list[Steps]:
        """The batches of one evaluation of the holdout."""
        n_full, rest = divmod(n_samples, batch_size)
        found = [(batch_size, n_full)] if n_full else []
        return [self._times(self._forward(size), count) for size, count in [*found, *([(rest, 1)] if rest else [])]]

    def start_s(self) -> float:
        """Until a fresh worker has opened the training session."""
        known = self.profile.worker_start_s
        start = known.value if known is not None else START_CALLS * self.profile.speed.call_s
        calls = self.cost.step_work.calls if self.cost.step_work is not None else 0
        return start * (1 + calls / OPENING_LINEAR + (calls / OPENING_QUADRATIC) ** 2)

    def _forward(self, n_samples: int) -> Steps:
        return self._steps(self.cost.forward_work, 2 * self.cost.forward_macs * n_samples, n_samples)

    def _steps(self, work: Work | None, flops: float, n_samples: int) -> Steps:
        profile, granted = self.profile, self.profile.granted_flops_per_s
        if work is None:  # compiled before work was counted
            own_s = flops / profile.planning_flops_per_s
        else:
            own_s = profile.speed.seconds(
                product_flops=work.product_flops(n_samples),
                moved_bytes=work.moved_bytes(n_samples) + LOADING_PASSES * n_samples * self.sample_bytes,
                calls=work.calls + LOOP_CALLS,
            )
        return Steps(count=1, own_s=own_s, paced_s=0.0 if granted is None else flops / granted.value)

    @staticmethod
    def _times(steps: Steps, count: int) -> Steps:
        return Steps(count=count, own_s=steps.own_s, paced_s=steps.paced_s)


def total_s(steps: list[Steps], factor: float = 1.0) -> float:
    """Seconds of all of them, at a device `factor` times slower than its profile."""
    return sum(part.seconds(factor) for part in steps)
