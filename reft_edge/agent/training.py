"""One round of local training: received weights in, trained weights and what they brought out.

Numerics only: no files, no messages, no process. The same trainer state, data, plan and seed give the same result.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from reft_edge.agent.pacing import Pacer
from reft_edge.bundle.manifest import Cost, CrossEntropy, Loss
from reft_edge.data.dataset import Dataset, batches, n_batches
from reft_edge.errors import ReftError
from reft_edge.wire.messages import TrainingPlan

if TYPE_CHECKING:
    from reft_edge.types import Array


class DivergedError(ReftError):
    """The loss or a weight is not finite any more."""


class CancelledError(ReftError):
    """The task is not wanted any more."""


class StepTrainer(Protocol):
    """What is needed of `reft_edge.agent.trainer.Trainer`."""

    def step(self, inputs: Array, targets: Array, learning_rate: float) -> float: ...

    def predict(self, inputs: Array, *, batch_size: int) -> Array: ...

    def state(self) -> dict[str, Array]: ...


@dataclass(frozen=True, kw_only=True)
class TrainedRound:
    """Trained weights, under the names of `Manifest.tensors`, and how training went."""

    tensors: dict[str, Array]
    steps: int
    loss_first: float
    loss_last: float
    """Mean over the first and over the last local epoch."""
    metric_before: float | None
    metric_after: float | None
    """Accuracy or mean squared error on the holdout; None when there is none."""
    first_step_at: float
    """`time.monotonic()`, which all processes share."""
    training_s: float
    """Steps and their pauses; the evaluations are not in it."""


def derive_seed(*parts: str) -> int:
    """63 bits from names and numbers, equal on every platform."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "little") >> 1


def split_seed(device: str) -> int:
    """A device's split into training and holdout is the same in every round: no sample changes sides."""
    return derive_seed(device, "split")


def learning_rate_at(plan: TrainingPlan, step: int, n_steps: int) -> float:
    """The rate for step `step` of 0 to `n_steps` - 1; cosine as in Loshchilov and Hutter, arXiv 1608.03983, eq. 5."""
    if plan.learning_rate_schedule == "constant":
        return plan.learning_rate
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def train_round(
    trainer: StepTrainer,
    *,
    training: Dataset,
    holdout: Dataset,
    plan: TrainingPlan,
    loss: Loss,
    cost: Cost,
    seed: int,
    pacer: Pacer,
    on_step: Callable[[int, int, float], None],
) -> TrainedRound:
    """Train the trainer's present weights for `plan.local_epochs`.

    `on_step(done, total, loss)` is called after each step and may raise `CancelledError`. Raises `DivergedError`.
    """
    rng = np.random.default_rng(seed)
    metric_before = _metric(trainer, holdout, loss, cost, plan.batch_size, pacer)
    n_steps = plan.local_epochs * n_batches(len(training), plan.batch_size)
    epoch_losses: list[float] = []
    step = 0
    began = time.monotonic()
    for _ in range(plan.local_epochs):
        losses: list[float] = []
        for inputs, targets in batches(training, plan.batch_size, rng):
            pacer.begin()
            value = trainer.step(inputs, targets, learning_rate_at(plan, step, n_steps))
            pacer.end(cost.step_flops(len(inputs)))
            step += 1
            if not math.isfinite(value):
                raise DivergedError(f"the loss is {value} after step {step} of {n_steps}; lower the learning rate")
            losses.append(value)
            on_step(step, n_steps, value)
        epoch_losses.append(math.fsum(losses) / len(losses))
    training_s = time.monotonic() - began
    tensors = trainer.state()
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise DivergedError(f"{name!r} is not finite after {step} steps; lower the learning rate")
    return TrainedRound(
        tensors=tensors,
        steps=step,
        loss_first=epoch_losses[0],
        loss_last=epoch_losses[-1],
        metric_before=metric_before,
        metric_after=_metric(trainer, holdout, loss, cost, plan.batch_size, pacer),
        first_step_at=began,
        training_s=training_s,
    )


def _metric(
    trainer: StepTrainer, holdout: Dataset, loss: Loss, cost: Cost, batch_size: int, pacer: Pacer
) -> float | None:
    """Accuracy for cross entropy, mean squared error otherwise; None without samples or when it is not finite."""
    if len(holdout) == 0 or holdout.targets is None:
        return None
    total = 0.0
    # Some batches at a time: each call copies the weights, and each sample takes four times its bytes as floats.
    n_at_once = 16 * batch_size
    for start in range(0, len(holdout), n_at_once):
        which = slice(start, start + n_at_once)
        inputs, targets = holdout.samples(which), holdout.targets[which]
        pacer.begin()
        outputs = trainer.predict(inputs, batch_size=batch_size)
        pacer.end(2.0 * cost.forward_macs * len(inputs))
        if isinstance(loss, CrossEntropy):
            total += float((outputs.argmax(axis=1) == targets).sum())
        else:
            with np.errstate(over="ignore"):
                total += float(np.square(outputs - targets, dtype=np.float64).reshape(len(inputs), -1).mean(1).sum())
    mean = total / len(holdout)
    return mean if math.isfinite(mean) else None
