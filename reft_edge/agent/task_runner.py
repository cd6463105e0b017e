"""One task from blobs in the spool to an update in the spool. Runs in the worker, and stays warm there.

Kept between tasks: the training session while the graphs are the same, and the data. Nothing is kept that a fresh
process would not compute again in the same way, so a killed worker changes no result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.agent.confinement import forget_peak_memory, peak_memory_bytes
from reft_edge.agent.pacing import Pacer
from reft_edge.agent.protocol import Configure, Finished, Train
from reft_edge.agent.received_weights import read_weights
from reft_edge.agent.session_words import FailureKind, Residual
from reft_edge.agent.spool import REBUILT, write_atomically
from reft_edge.agent.trainer import Trainer
from reft_edge.agent.training import DivergedError, TrainedRound, derive_seed, split_seed, train_round
from reft_edge.bundle.container import container_limit, pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import Manifest
from reft_edge.data.dataset import Dataset
from reft_edge.data.load import load_dataset
from reft_edge.errors import BundleError, DataError, ReftError, ResourceError
from reft_edge.profiling.thermal import read_thermal
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Selective
from reft_edge.wire.codecs import weight_norms
from reft_edge.wire.compensation.methods import update_encoder
from reft_edge.wire.compensation_names import compensation_name, keeps_memory, kept_states
from reft_edge.wire.messages import Measured, Task, UpdateManifest

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors

OWN_STATE_BYTES = 64
"""What a compensation keeps beside tensors of the model's shapes."""

logger = logging.getLogger(__name__)


class TaskError(ReftError):
    """The task cannot be finished; `kind` is what the coordinator is told."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: FailureKind = kind


@dataclass(frozen=True, kw_only=True)
class _LoadedData:
    """Training and holdout part, fitted to one kind of input."""

    key: tuple[object, ...]
    training: Dataset
    holdout: Dataset


@dataclass(frozen=True, kw_only=True)
class _WarmTrainer:
    key: tuple[object, ...]
    trainer: Trainer


class TaskRunner:
    """Runs tasks, one at a time."""

    def __init__(self, configure: Configure) -> None:
        self._configure = configure
        spool = Path(configure.spool)
        self._blobs = BlobStore(spool / "blobs", max_blob_bytes=configure.limits.max_model_bytes)
        self._rebuilt = spool / REBUILT
        self._residuals = spool / "residuals"
        self._data: _LoadedData | None = None
        self._warm: _WarmTrainer | None = None

    def run(self, command: Train, on_step: Callable[[int, int, float], None]) -> Finished:
        """Train and store the update; `on_step` may raise `CancelledError`. Raises `TaskError` and `DeltaError`."""
        forget_peak_memory()
        task = command.task
        try:
            manifest = Manifest.from_json(self._blobs.read(task.bundle))
            received = read_weights(task, manifest, blobs=self._blobs, rebuilt=self._rebuilt)
            data = self._load_data(manifest, task)
            trained = self._train(manifest, received, data, task, on_step)
        except (MemoryError, ResourceError) as exc:
            raise TaskError("out_of_memory", str(exc) or "the device has not enough memory for this task") from exc
        except DataError as exc:
            raise TaskError("data", str(exc)) from exc
        except BundleError as exc:
            raise TaskError("bundle", str(exc)) from exc
        except DivergedError as exc:
            raise TaskError("diverged", str(exc)) from exc
        try:
            return self._store(command, manifest, received, trained, data)
        except MemoryError as exc:
            raise TaskError("out_of_memory", "not enough memory to encode the update") from exc
        except ResourceError as exc:
            raise TaskError("storage", str(exc)) from exc
        except BundleError as exc:  # finite weights whose difference is not
            raise TaskError("diverged", str(exc)) from exc

    def _load_data(self, manifest: Manifest, task: Task) -> _LoadedData:
        """The device's data as this model takes them; read once while models of one kind follow each other."""
        key = (manifest.input, manifest.target, manifest.output, task.classes)
        if self._data is None or self._data.key != key:
            self._data = None  # never hold both
            settings = self._configure.data
            dataset = load_dataset(
                settings,
                base_dir=Path(self._configure.base_dir),
                input_shape=manifest.input.shape,
                classes=task.classes,
                compact=True,
            ).for_model(
                input_shape=manifest.input.shape,
                input_dtype=manifest.input.dtype,
                target_shape=manifest.target.shape,
                target_dtype=manifest.target.dtype,
                n_outputs=manifest.output.shape[0] if manifest.output.shape else None,
            )
            training, holdout = dataset.split(settings.holdout_fraction, split_seed(self._configure.device))
            self._data = _LoadedData(key=key, training=training, holdout=holdout)
        return self._data

    def _train(
        self,
        manifest: Manifest,
        received: Tensors,
        data: _LoadedData,
        task: Task,
        on_step: Callable[[int, int, float], None],
    ) -> TrainedRound:
        seed = derive_seed(self._configure.device, str(task.plan.seed))
        return train_round(
            self._trainer(manifest, received, seed),
            training=data.training,
            holdout=data.holdout,
            plan=task.plan,
            loss=manifest.loss,
            cost=manifest.cost,
            seed=seed,
            pacer=Pacer(self._configure.limits.training_flops_per_s),
            on_step=on_step,
        )

    def _trainer(self, manifest: Manifest, received: Tensors, seed: int) -> Trainer:
        """A trainer that begins with the received weights and an empty optimizer."""
        key = (manifest.training_graph, manifest.inference_graph, manifest.tensors)
        if self._warm is not None and self._warm.key == key:
            self._warm.trainer.restart(received, seed=seed)
            return self._warm.trainer
        self._warm = None  # free the old session before the new one is opened
        trainer = Trainer.from_parts(
            manifest,
            self._blobs.read(manifest.training_graph),
            self._blobs.read(manifest.inference_graph),
            received,
            threads=self._configure.limits.n_threads,
            spin=self._configure.limits.spin,
            seed=seed,
        )
        self._warm = _WarmTrainer(key=key, trainer=trainer)
        return trainer

    def _store(
        self, command: Train, manifest: Manifest, received: dict[str, Array], trained: TrainedRound, data: _LoadedData
    ) -> Finished:
        """Encode what training changed, going on from the last update; update and state go to the spool."""
        task, plan = command.task, command.task.plan
        norms = weight_norms(received) if isinstance(plan.update_codec, Selective) else None
        delta = _subtract(trained.tensors, received)
        key = f"{task.run}:{manifest.training_graph.sha256}:{compensation_name(plan.compensation)}"
        known = self._read_residual(command.residual, key, manifest, n_states=kept_states(plan.compensation))
        encoder = update_encoder(plan.compensation, plan.update_codec, known)
        rng = np.random.default_rng(derive_seed(self._configure.device, str(plan.seed), "codec"))
        blob = self._blobs.put(encoder.encode(delta, rng=rng, norms=norms))
        residual = None
        if encoder.state:
            # A new name for each update: until the daemon has noted it, a repetition starts from the old one.
            name = f"{task.task}-{blob.sha256[:16]}.safetensors.zst"
            residual = Residual(name=name, key=key, update=blob.sha256)
            write_atomically(self._residuals / name, pack_tensors(encoder.state))
        update = UpdateManifest(
            blob=blob,
            codec=plan.update_codec,
            memory=task.memory if known is not None and keeps_memory(plan.compensation) else None,
            training_samples=len(data.training),
            holdout_samples=len(data.holdout),
            loss_first=trained.loss_first,
            loss_last=trained.loss_last,
            holdout_metric_before=trained.metric_before,
            holdout_metric_after=trained.metric_after,
        )
        thermal = read_thermal()
        measured = Measured(
            download_s=0.0,  # the session fills it in
            start_s=max(0.0, trained.first_step_at - command.asked_at),
            training_s=trained.training_s,
            steps=trained.steps,
            peak_memory_bytes=peak_memory_bytes(),
            temperature_celsius=thermal.temperature_celsius,
            throttled=thermal.throttled,
        )
        return Finished(task=task.task, update=update, measured=measured, residual=residual)

    def _read_residual(
        self, residual: Residual | None, key: str, manifest: Manifest, *, n_states: int
    ) -> Tensors | None:
        """What was kept, if it belongs to this run, these graphs and this method. A lost one costs precision, not the
        task."""
        if residual is None or residual.key != key:
            return None
        limit = container_limit(sum(n_states * 4 * spec.n_elements for spec in manifest.tensors) + OWN_STATE_BYTES)
        try:
            return unpack_tensors((self._residuals / residual.name).read_bytes(), max_bytes=limit)[0]
        except (OSError, BundleError) as exc:
            logger.warning("what the last update left is lost: %s", exc)
            return None


def _subtract(trained: dict[str, Array], received: dict[str, Array]) -> dict[str, Array]:
    """Trained minus received, in the place of `trained`; `received` is emptied. A device holds few copies of a model.

    Booleans (masks among the buffers) have no difference; theirs is False.
    """
    for name, after in trained.items():
        before = received.pop(name)
        if after.dtype == np.bool_:
            after[...] = False
        else:
            np.subtract(after, before, out=after)
    return trained
