"""What one reference training step asks for, as its manifest counts it.

The step itself (`reft_edge.agent.reference_step`) is run on devices; a planner needs only its count, to know what a
device's one figure, FLOP/s of that step, stands for. The manifest is part of the package.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import msgspec

from reft_edge.profiling.speed import Speed

REFERENCE_FOLDER = "reference_step"
MANIFEST_FILE = "manifest.json"

REFERENCE_BATCH_SIZE = 32
"""The batch of the project's other measurements. At 15 million multiply-accumulates a sample, one step takes about
0.6 s on the slowest board, a Raspberry Pi Zero 2 W."""


class _Work(msgspec.Struct, frozen=True, kw_only=True):
    product_flops_fixed: int
    product_flops_per_sample: int
    moved_bytes_fixed: int
    moved_bytes_per_sample: int
    calls: int


class _Cost(msgspec.Struct, frozen=True, kw_only=True):
    step_flops_per_sample: int
    step_work: _Work


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a bundle's manifest that counts; `reft_edge.bundle` lies above this package."""

    cost: _Cost


class ReferenceStep(msgspec.Struct, frozen=True, kw_only=True):
    """The reference step on a batch of `REFERENCE_BATCH_SIZE`."""

    flops: float
    product_flops: float
    moved_bytes: float
    calls: float

    def seconds(self, speed: Speed) -> float:
        return speed.seconds(product_flops=self.product_flops, moved_bytes=self.moved_bytes, calls=self.calls)


@cache
def reference_step() -> ReferenceStep:
    """The count of the step that `training_flops_per_s` was measured with."""
    path = files("reft_edge") / "profiling" / REFERENCE_FOLDER / MANIFEST_FILE
    cost = msgspec.json.decode(path.read_bytes(), type=_Manifest).cost
    work, n_batch = cost.step_work, REFERENCE_BATCH_SIZE
    return ReferenceStep(
        flops=n_batch * cost.step_flops_per_sample,
        product_flops=work.product_flops_fixed + n_batch * work.product_flops_per_sample,
        moved_bytes=work.moved_bytes_fixed + n_batch * work.moved_bytes_per_sample,
        calls=work.calls,
    )
