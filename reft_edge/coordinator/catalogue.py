"""The variants of a run: pruned, compiled, kept.

A variant is made once in a run, from the model's initial weights, so its graphs and its channel map stay the same from
round to round and devices fetch new weights only. What is made is recorded in the store, with the blobs on disk, so
that nothing is compiled again after a restart.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reft_edge.bundle.manifest import BlobRef, Manifest
from reft_edge.compile import compile_bundle
from reft_edge.compile.channels import ChannelMap
from reft_edge.compile.prune import Budget, Pruner, Variant
from reft_edge.coordinator.records import VariantRecord
from reft_edge.errors import BundleError, ModelError
from reft_edge.models.registry import build_model

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.bundle.bundle import Bundle
    from reft_edge.coordinator.settings import ModelSettings, SizeLimits
    from reft_edge.coordinator.store import Store
    from reft_edge.wire.blobs import BlobStore


_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompiledVariant:
    """One rung of the ladder, ready to be sent. Graphs lie in the blob store under the manifest's names."""

    name: str
    ratio: float
    manifest: Manifest
    manifest_blob: BlobRef
    channels: ChannelMap


def variant_name(ratio: float) -> str:
    """How a variant is called in the store, in events and in file names, for example `0.5`."""
    return f"{ratio:g}"


def initial_model(settings: ModelSettings, *, base_dir: Path, seed: int) -> nn.Module:
    """The model before the first round, the same for the same seed. Raises `ModelError`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(
            settings.name, input_shape=settings.input_shape, n_outputs=settings.outputs, base_dir=base_dir
        )


class Workshop:
    """Prunes and compiles variants of one model. Knows neither runs nor disks.

    `model` is only read. `limits` hold for every variant but the whole model. Raises `ModelError` for what cannot be
    pruned or compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ModelSettings,
        *,
        importance: str,
        seed: int,
        limits: SizeLimits | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._importance = importance
        self._seed = seed
        self._limits = None if limits is None else Budget(**limits.given)
        self._pruner: Pruner | None = None

    def ladder(self, ratios: Sequence[float]) -> tuple[float, ...]:
        """The pruning ratios of variants without each of the shares `ratios` of the largest one's channels.

        The largest is the whole model, or the largest within the limits; ratios count channels of the whole model.
        Raises `PlanError` for limits that no variant meets.
        """
        if self._limits is None:
            return tuple(ratios)
        least = self._made_pruner().fit(self._limits, balanced=True).ratio
        return tuple(1 - (1 - least) * (1 - ratio) if ratio else least for ratio in ratios)

    def make(self, ratio: float) -> tuple[Bundle, ChannelMap]:
        """The bundle of the variant and its map into the global tensors."""
        variant = self._prune(ratio)
        settings = self._settings
        bundle = compile_bundle(
            variant.module,
            input_shape=settings.input_shape,
            loss=settings.loss_function,
            optimizer=settings.optimizer,
            name=settings.name if ratio == 0 else f"{settings.name} x {1 - ratio:.2f}",
            input_dtype=settings.input_dtype,
        )
        outputs = bundle.manifest.output.shape
        if outputs != (settings.outputs,):
            given = "classes" if settings.classes else "n_outputs"
            raise ModelError(
                f"model {settings.name!r} gives outputs of shape {outputs} a sample; [model] {given} asks for "
                f"({settings.outputs},)"
            )
        return bundle, variant.channels

    def module(self, ratio: float) -> nn.Module:
        """A new module of the variant's architecture, with its initial weights."""
        return copy.deepcopy(self._prune(ratio).module)

    def _prune(self, ratio: float) -> Variant:
        if ratio == 0:  # also for models of which nothing can be pruned
            tensors = {name: tensor.numpy() for name, tensor in self._model.state_dict().items()}
            return Variant(module=self._model, channels=ChannelMap.identity(tensors), ratio=0.0)
        return self._made_pruner().prune(ratio, within=self._limits)

    def _made_pruner(self) -> Pruner:
        """Made when it is first needed: tracing takes seconds, and most restarts prune nothing."""
        if self._pruner is None:
            self._pruner = Pruner(
                self._model,
                input_shape=self._settings.input_shape,
                input_dtype=self._settings.input_dtype,
                importance=self._importance,
                seed=self._seed,
            )
        return self._pruner


class Catalogue:
    """The variants of one run, made when they are first asked for."""

    def __init__(self, workshop: Workshop, *, run: str, store: Store, blobs: BlobStore) -> None:
        self._workshop = workshop
        self._run = run
        self._store = store
        self._blobs = blobs
        self._variants: dict[str, CompiledVariant] = {}
        for record in store.variants(run):
            self._variants[record.variant] = self._restore(record)

    def variant(self, ratio: float) -> CompiledVariant:
        """The variant of a pruning ratio, compiled now if it was not before. Raises `ModelError`."""
        name = variant_name(ratio)
        if name not in self._variants:
            self._variants[name] = self._make(name, ratio)
        return self._variants[name]

    def ladder(self, ratios: Sequence[float]) -> tuple[float, ...]:
        """See `Workshop.ladder`."""
        return self._workshop.ladder(ratios)

    def named(self, name: str) -> CompiledVariant:
        """A variant that was made before."""
        return self._variants[name]

    @property
    def blobs(self) -> set[str]:
        """SHA-256 of everything on disk that the variants need."""
        kept: set[str] = {record.channels.sha256 for record in self._store.variants(self._run)}
        for variant in self._variants.values():
            manifest = variant.manifest
            refs = (variant.manifest_blob, manifest.training_graph, manifest.inference_graph, manifest.weights)
            kept.update(ref.sha256 for ref in refs)
        return kept

    def mend(self) -> None:
        """Make again what our disk has lost of the variants: the same, byte for byte."""
        for record in self._store.variants(self._run):
            self._variants[record.variant] = self._restore(record)

    def _make(self, name: str, ratio: float) -> CompiledVariant:
        bundle, channels = self._workshop.make(ratio)
        for blob in (bundle.training_graph, bundle.inference_graph, bundle.weights):
            self._blobs.put(blob)
        manifest_blob = self._blobs.put(bundle.manifest.to_json())
        channels_blob = self._blobs.put(channels.to_bytes())
        record = VariantRecord(variant=name, ratio=ratio, manifest=manifest_blob, channels=channels_blob)
        self._store.save_variant(self._run, record)
        return CompiledVariant(
            name=name, ratio=ratio, manifest=bundle.manifest, manifest_blob=manifest_blob, channels=channels
        )

    def _restore(self, record: VariantRecord) -> CompiledVariant:
        """A variant that was made before, and again when what devices or teachers need of it is damaged."""
        try:
            manifest = Manifest.from_json(self._blobs.read(record.manifest))
            channels = ChannelMap.from_bytes(self._blobs.read(record.channels))
            for graph in (manifest.training_graph, manifest.inference_graph):
                self._blobs.read(graph)
        except BundleError as exc:
            _log.warning("variant %s is compiled again: %s", record.variant, exc)
            return self._make(record.variant, record.ratio)
        return CompiledVariant(
            name=record.variant,
            ratio=record.ratio,
            manifest=manifest,
            manifest_blob=record.manifest,
            channels=channels,
        )
