"""The heavy part of a round: merge, new batch-norm statistics, distil, evaluate.

Every step takes a blob with global tensors and returns one, so it can be repeated after a kill: the result depends only
on blobs, settings and seed. Peak memory: the model twice, one module of each variant, one update with its
map, and the teachers' outputs; a robust rule adds what `robust.merging` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from reft_edge.bundle.container import container_limit, pack_tensors, unpack_tensors
from reft_edge.coordinator.aggregation import ClientUpdate, merge
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.batch_norm import has_batch_norm, reestimate_batch_norm
from reft_edge.coordinator.contributions import Contribution, ContributionError, read_update, trained_weights
from reft_edge.coordinator.distillation import DistillationProgress, distil, views_of
from reft_edge.coordinator.ensemble import Teacher, teacher_of
from reft_edge.coordinator.evaluation import Metrics, evaluate
from reft_edge.coordinator.events import Distilling, Listener, ignore
from reft_edge.coordinator.records import MetricRecord, Stage
from reft_edge.coordinator.robust.merging import merge_robustly
from reft_edge.coordinator.screening import bounded_weights
from reft_edge.errors import BundleError

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.bundle.manifest import BlobRef, Loss
    from reft_edge.coordinator.augmentation import Views
    from reft_edge.coordinator.distillation_settings import DistillationSettings
    from reft_edge.data.dataset import Dataset
    from reft_edge.types import Array, Tensors
    from reft_edge.wire.blobs import BlobStore


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """What the steps need beside tensors. `public` and `test` are shaped for the model."""

    loss: Loss
    aggregation: AggregationSettings
    distillation: DistillationSettings
    seed: int
    public: Dataset | None = None
    test: Dataset | None = None
    threads: int = 1
    """For the teachers' sessions in onnxruntime."""


Measured: TypeAlias = tuple[tuple[Stage, Metrics], ...]
"""What was measured on the test data, in order; empty without test data."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Global tensors after a step, and what was measured on the way, in order."""

    weights: BlobRef
    measured: Measured = ()
    kept_epoch: int | None = None
    """Distilling: the epoch whose weights these are; 0 is the merged model. None when nothing was distilled."""


def metric_records(measured: Measured, *, round_number: int) -> list[MetricRecord]:
    """Metrics as the store keeps them."""
    return [
        MetricRecord(round=round_number, stage=stage, name=name, value=value)
        for stage, metrics in measured
        for name in ("loss", "accuracy", "mse")
        if (value := getattr(metrics, name)) is not None
    ]


class Learner:
    """Works on one module, which holds whatever tensors the last step left.

    `variant_module` gives a new module of the variant of a pruning ratio; its tensors do not matter.
    """

    def __init__(
        self,
        model: nn.Module,
        blobs: BlobStore,
        options: LearningOptions,
        variant_module: Callable[[float], nn.Module],
    ) -> None:
        self.model = model
        self._blobs = blobs
        self._options = options
        self._variant_module = variant_module
        self._variant_modules: dict[float, nn.Module] = {}
        self.n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        """Of all tensors, as the model computes with them (float32)."""

    def save(self) -> BlobRef:
        """The module's tensors as a blob, float32, uncoded: the global model's memory."""
        return self._put({name: tensor.detach().numpy() for name, tensor in self.model.state_dict().items()})

    def read(self, weights: BlobRef) -> dict[str, Array]:
        """Global tensors out of a blob that `save` or a step wrote. Raises `BundleError`."""
        return unpack_tensors(self._blobs.read(weights), max_bytes=container_limit(self.n_bytes))[0]

    def load(self, weights: BlobRef) -> None:
        self._load(self.read(weights))

    def evaluate(self, stage: Stage) -> Measured:
        """Metrics of the module on the test data; empty without."""
        if self._options.test is None:
            return ()
        return ((stage, evaluate(self.model, self._options.test)),)

    def merge(self, weights: BlobRef, contributions: Sequence[Contribution]) -> Outcome:
        """The step that the updates give by the rule of the settings, then batch-norm statistics from public inputs.

        Raises `ContributionError` for an update that cannot be read, `BundleError` for such weights.
        """
        self._load(self._merged(self.read(weights), contributions))
        measured = self.evaluate("merged")
        if self._options.public is not None and reestimate_batch_norm(self.model, self._options.public.inputs):
            measured += self.evaluate("batch_norm")
        return Outcome(weights=self.save(), measured=measured)

    def distil(
        self,
        merged: BlobRef,
        contributions: Sequence[Contribution],
        *,
        round_number: int,
        listener: Listener = ignore,
    ) -> Outcome:
        """The merged model taught by the updated variants; unchanged when distillation is off.

        Raises `ContributionError` for a variant that cannot be read, `BundleError` for such weights.
        """
        options = self._options
        self.load(merged)
        if options.public is None or options.distillation.epochs == 0:
            return Outcome(weights=merged)

        def progress(state: DistillationProgress) -> None:
            listener(Distilling(round=round_number, epoch=state.epoch, epochs=state.epochs, loss=state.loss))

        seed = options.seed + round_number
        views = views_of(options.public.inputs, options.distillation, seed)
        result = distil(
            self.model,
            self._teachers(contributions, views),
            options.public.inputs,
            settings=options.distillation,
            loss=options.loss,
            labels=options.public.targets,
            seed=seed,
            progress=progress,
        )
        return Outcome(weights=self.save(), kept_epoch=result.kept_epoch)

    def _merged(self, start: Tensors, contributions: Sequence[Contribution]) -> dict[str, Array]:
        settings = self._options.aggregation
        parameters = {name for name, _ in self.model.named_parameters()}
        if settings.rule == "mean":
            over_cohort = parameters if settings.divide_by == "cohort" else ()
            return merge(start, self._updates(contributions), over_cohort=over_cohort)
        return merge_robustly(
            start,
            self._updates(contributions),
            settings=settings,
            parameters=parameters,
            directory=self._blobs.root,
        )

    def _updates(self, contributions: Sequence[Contribution]) -> Iterator[ClientUpdate]:
        """One update at a time, in order of devices: sums of floats depend on the order."""
        weights = _bounded_samples(contributions)
        for contribution in sorted(contributions, key=lambda item: item.device):
            yield ClientUpdate(
                device=contribution.device,
                channels=contribution.variant.channels,
                delta=read_update(contribution, self._blobs),
                weight=weights[contribution.device],
            )

    def _teachers(self, contributions: Sequence[Contribution], views: Views) -> list[Teacher]:
        samples = _bounded_samples(contributions)
        return [self._teacher(one, views, samples[one.device]) for one in contributions]

    def _teacher(self, contribution: Contribution, views: Views, samples: float) -> Teacher:
        try:
            graph = self._blobs.read(contribution.variant.manifest.inference_graph)
        except BundleError as exc:
            raise ContributionError(contribution.device, str(exc)) from exc
        weights: Tensors = trained_weights(contribution, self._blobs)
        if has_batch_norm(self.model):
            weights = self._with_public_statistics(contribution.variant.ratio, weights, views.inputs)
        name = contribution.device
        return teacher_of(name, graph, weights, views, samples=samples, threads=self._options.threads)

    def _with_public_statistics(self, ratio: float, weights: Tensors, inputs: Array) -> Tensors:
        """A teacher's weights with batch-norm statistics of the inputs that it teaches on.

        A device's own are those of its classes, and after a few steps still mostly the initial ones: such a teacher
        gives one class for everything.
        """
        if ratio not in self._variant_modules:
            self._variant_modules[ratio] = self._variant_module(ratio)
        module = self._variant_modules[ratio]
        module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        reestimate_batch_norm(module, inputs)
        return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}

    def _load(self, tensors: Tensors) -> None:
        self.model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})

    def _put(self, tensors: Tensors) -> BlobRef:
        return self._blobs.put(pack_tensors(tensors))


def _bounded_samples(contributions: Sequence[Contribution]) -> dict[str, float]:
    """What each device counts where samples do: its own word, within bounds that the cohort sets."""
    return bounded_weights({one.device: one.update.training_samples for one in contributions})
