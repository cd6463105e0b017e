"""Distil: the merged global model learns from the variants that the devices trained, on public data.

What the teachers say together is `ensemble`'s business. The student starts as the merged model. For classification it
minimises

    T^2 KL( p || softmax(z_s / T) )

for the ensemble's probabilities p (Hinton et al., arXiv 1503.02531, section 2, for the temperature T and the factor
T^2; Lin et al., FedDF, arXiv 2006.07242, algorithm 1, for an ensemble of clients as teacher, the averaged model as
start and unlabelled data). For regression the loss is the squared distance to the ensemble's output. With augmentation
each epoch shows the next view of the public inputs, with what the teachers say about that view (`augmentation`).

No labels are needed. Where the public data have labels, a part is held out to stop early and to choose the best epoch;
the merged model is epoch 0 and wins ties, so distilling never returns something that scores worse there.

Peak memory: the teachers' outputs (n_teachers x n_views x n_public x n_outputs floats, and four times one view of that
while agreement is measured), one view of the inputs, one batch of activations, and one copy of the student.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from reft_edge.bundle.manifest import CrossEntropy, Loss, MeanSquaredError
from reft_edge.coordinator.augmentation import Views
from reft_edge.coordinator.compute import on_compute_device
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.ensemble import Teacher, targets_of_views
from reft_edge.coordinator.evaluation import Metrics, evaluate
from reft_edge.data.dataset import PICTURE_SCALE, Dataset
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from reft_edge.types import Array, IntArray


class DistillationProgress(msgspec.Struct, frozen=True, kw_only=True):
    """State after an epoch; `held_out` is None without labels."""

    epoch: int
    epochs: int
    loss: float
    held_out: Metrics | None = None


class DistillationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What distilling did. `kept_epoch` 0 means that the merged model was better, or distilling diverged; it is
    unchanged then."""

    epochs_run: int
    kept_epoch: int
    losses: tuple[float, ...]
    """Mean loss of each epoch."""
    held_out_before: Metrics | None = None
    held_out_after: Metrics | None = None
    """Of the model that is kept."""

    @property
    def kept_merged(self) -> bool:
        """Whether the merged model was kept."""
        return self.kept_epoch == 0


def views_of(public_inputs: Array, settings: DistillationSettings, seed: int) -> Views:
    """The views that `distil` shows for these arguments: what teachers must have seen."""
    return Views(inputs=public_inputs, settings=settings.augmentation, seed=seed)


def distil(
    student: nn.Module,
    teachers: Sequence[Teacher],
    public_inputs: Array,
    *,
    settings: DistillationSettings,
    loss: Loss | None = None,
    labels: Array | None = None,
    seed: int = 0,
    progress: Callable[[DistillationProgress], None] | None = None,
) -> DistillationResult:
    """Train `student`, in place, towards what the teachers say about `public_inputs` (n_public, *sample_shape).

    The teachers have seen `views_of` the same arguments. `loss` is the loss that the devices train with (default cross
    entropy); it decides between KL divergence and squared error. `labels` (n_public, ...) only choose the epoch. The
    same seed gives the same result on one processor; global random state is left as it was. Raises `FederationError`
    for teachers that do not fit, `DataError` for too little public data.
    """
    views = views_of(public_inputs, settings, seed)
    targets = targets_of_views(
        teachers, settings=settings, loss=loss or CrossEntropy(), n_public=len(public_inputs), n_views=len(views)
    )
    training, held_out = _split(public_inputs, labels, settings.held_out_fraction, seed)
    if settings.epochs == 0:
        return DistillationResult(epochs_run=0, kept_epoch=0, losses=())
    if len(training) < 2:
        raise DataError(f"distillation needs at least 2 public samples to train on; there are {len(training)}")
    mode = student.training
    with (
        on_compute_device(student) as device,
        _channels_last(student),
        torch.random.fork_rng(_cuda_devices(device)),
    ):
        torch.manual_seed(seed)
        run = _Run(
            student=student,
            views=views,
            training=training,
            targets=[torch.as_tensor(one[training]).to(device) for one in targets],
            device=device,
            settings=settings,
            objective=_squared_error
            if isinstance(loss, MeanSquaredError)
            else _soft_cross_entropy(settings.temperature),
        )
        result = _train(run, held_out, progress, seed)
    student.train(mode)
    return result


def _split(inputs: Array, labels: Array | None, fraction: float, seed: int) -> tuple[IntArray, Dataset | None]:
    """Indices to train on, and the held-out part when there are labels (and at least one sample for it)."""
    n_held = 0 if labels is None else int(len(inputs) * fraction)
    if labels is None or n_held == 0:
        return np.arange(len(inputs)), None
    if len(labels) != len(inputs):
        raise DataError(f"{len(labels)} labels for {len(inputs)} public inputs")
    order = np.random.default_rng(seed).permutation(len(inputs))
    held = np.sort(order[:n_held])
    return np.sort(order[n_held:]), Dataset(inputs=inputs[held], targets=labels[held])


@contextmanager
def _channels_last(module: nn.Module) -> Iterator[None]:
    """Weights of convolutions with their channels last in memory: an epoch takes a quarter less time for `vgg_small` on
    a processor, 40% less for `mobilenet_v2`. Other modules and other ranks are left alone."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it for modules
    try:
        yield
    finally:
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(student outputs, targets) -> loss."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    student: nn.Module
    views: Views
    training: IntArray
    """Which of the public inputs are trained on."""
    targets: Sequence[torch.Tensor]
    """Of those, for each view."""
    device: torch.device
    settings: DistillationSettings
    objective: Objective

    def samples(self, number: int) -> torch.Tensor:
        """What is trained on, in one view."""
        return torch.as_tensor(self.views.view(number)[self.training]).to(self.device)


def _soft_cross_entropy(temperature: float) -> Objective:
    def objective(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_student = functional.log_softmax(outputs / temperature, dim=-1)
        return functional.kl_div(log_student, targets, reduction="batchmean") * temperature**2

    return objective


def _squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(outputs, targets)


def _train(
    run: _Run, held_out: Dataset | None, progress: Callable[[DistillationProgress], None] | None, seed: int
) -> DistillationResult:
    """All epochs; leaves in the student the best epoch on `held_out`, or the last without it, and no diverged one."""
    settings = run.settings
    before = _score(run.student, held_out)
    best, best_epoch, best_state = before, 0, copy.deepcopy(run.student.state_dict())
    optimizer = _optimizer(run.student, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * _n_batches(run))
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    diverged = False
    for epoch in range(1, settings.epochs + 1):
        losses.append(_train_epoch(run, (epoch - 1) % len(run.views), optimizer, schedule, order))
        if not math.isfinite(losses[-1]):
            best_epoch = best_epoch if held_out is not None else 0
            diverged = True
            break
        now = _score(run.student, held_out)
        if progress is not None:
            progress(DistillationProgress(epoch=epoch, epochs=settings.epochs, loss=losses[-1], held_out=now))
        if best is None or now is None:
            best_epoch = epoch
        elif (now.score, -now.loss) > (best.score, -best.loss):
            best, best_epoch, best_state = now, epoch, copy.deepcopy(run.student.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    if held_out is not None or diverged:
        run.student.load_state_dict(best_state)
    return DistillationResult(
        epochs_run=len(losses),
        kept_epoch=best_epoch,
        losses=tuple(losses),
        held_out_before=before,
        held_out_after=best,
    )


def _train_epoch(
    run: _Run,
    view: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    order: torch.Generator,
) -> float:
    """One pass over a view of the public inputs in an order drawn from `order`; returns its batches' mean loss."""
    run.student.train()
    inputs, targets = run.samples(view), run.targets[view]
    permutation = torch.randperm(len(inputs), generator=order)
    total = 0.0
    for indices in permutation.tensor_split(_n_batches(run)):
        chosen = indices.to(run.device)
        loss = run.objective(run.student(_scaled(inputs[chosen])), targets[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / _n_batches(run)


def _scaled(inputs: torch.Tensor) -> torch.Tensor:
    """As `data.dataset.scale`: pictures stay bytes until their batch is needed."""
    return inputs * float(PICTURE_SCALE) if inputs.dtype == torch.uint8 else inputs


def _n_batches(run: _Run) -> int:
    """Batches of nearly equal size: a rest of one sample would break batch norm."""
    return max(1, -(-len(run.training) // run.settings.batch_size))


def _optimizer(student: nn.Module, settings: DistillationSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(student.parameters(), lr=settings.learning_rate, momentum=0.9)
    return torch.optim.Adam(student.parameters(), lr=settings.learning_rate)


def _score(student: nn.Module, held_out: Dataset | None) -> Metrics | None:
    return None if held_out is None else evaluate(student, held_out)
