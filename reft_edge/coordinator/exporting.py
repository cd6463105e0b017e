"""The run's end products: the global model and one model for each kind of device, as ONNX files.

A variant is cut out of the final global model. Where there are public data it then learns from that model by
distillation, because channels that were trained beside others do not work the same without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reft_edge.coordinator.batch_norm import reestimate_batch_norm
from reft_edge.coordinator.distillation import distil, views_of
from reft_edge.coordinator.ensemble import Teacher, teacher_of
from reft_edge.coordinator.export import ExportedFile, export_model
from reft_edge.coordinator.records import ExportRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from reft_edge.coordinator.catalogue import CompiledVariant, Workshop
    from reft_edge.coordinator.file_metadata import Origin
    from reft_edge.coordinator.learning import LearningOptions
    from reft_edge.types import Array, Tensors
    from reft_edge.wire.blobs import BlobStore

GLOBAL_NAME = "global"


class Exporter:
    """Writes the files of one run into `directory`."""

    def __init__(
        self,
        *,
        whole: CompiledVariant,
        global_tensors: Tensors,
        workshop: Workshop,
        blobs: BlobStore,
        options: LearningOptions,
        directory: Path,
        origin: Origin,
    ) -> None:
        self._whole = whole
        self._global_tensors = global_tensors
        self._workshop = workshop
        self._blobs = blobs
        self._options = options
        self._directory = directory
        self._origin = origin

    def export(self, variants: Sequence[CompiledVariant]) -> Iterator[ExportRecord]:
        """The global model, then each variant that is smaller. Raises `ModelError` or `ResourceError`."""
        yield from self._write(GLOBAL_NAME, self._whole, self._global_tensors)
        teacher = self._teacher() if any(variant.ratio > 0 for variant in variants) else None
        for variant in variants:
            if variant.ratio > 0:
                yield from self._write(f"variant-{variant.name}", variant, self._fit(variant, teacher))

    def _teacher(self) -> Teacher | None:
        """The global model with its outputs on the public inputs; None where there is nothing to distil."""
        options = self._options
        if options.public is None or options.distillation.epochs == 0:
            return None
        return teacher_of(
            GLOBAL_NAME,
            self._blobs.read(self._whole.manifest.inference_graph),
            self._global_tensors,
            views_of(options.public.inputs, options.distillation, options.seed),
            samples=1.0,
            threads=options.threads,
        )

    def _fit(self, variant: CompiledVariant, teacher: Teacher | None) -> dict[str, Array]:
        """The variant's final tensors."""
        tensors = variant.channels.gather(self._global_tensors)
        public = self._options.public
        if public is None:
            return tensors
        module = self._workshop.module(variant.ratio)
        module.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
        reestimate_batch_norm(module, public.inputs)
        if teacher is not None:
            distil(
                module,
                [teacher],
                public.inputs,
                settings=self._options.distillation,
                loss=self._options.loss,
                labels=public.targets,
                seed=self._options.seed,
            )
        return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}

    def _write(self, name: str, variant: CompiledVariant, tensors: Tensors) -> Iterator[ExportRecord]:
        public = self._options.public
        made = export_model(
            name=name,
            manifest=variant.manifest,
            inference_graph=self._blobs.read(variant.manifest.inference_graph),
            weights=tensors,
            directory=self._directory,
            calibration=None if public is None else public.inputs,
            test=self._options.test,
            origin=self._origin,
        )
        yield _record(name, made.float32, variant)
        if made.int8 is not None:
            yield _record(f"{name}.int8", made.int8, variant)


def _record(name: str, file: ExportedFile, variant: CompiledVariant) -> ExportRecord:
    values: dict[str, float] = {"size_bytes": file.size_bytes, "ratio": variant.ratio}
    if file.metrics is not None:
        measured = {"accuracy": file.metrics.accuracy, "mse": file.metrics.mse, "loss": file.metrics.loss}
        values |= {key: value for key, value in measured.items() if value is not None}
    return ExportRecord(name=name, path=str(file.path), sha256=file.sha256, values=values)
