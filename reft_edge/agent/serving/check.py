"""The worker's check of a deployment: unpack, run, measure, judge, and install what may serve.

Files are timed first, one after the other and as a process that predicts would run them, before anything else takes
memory. Then each is scored on the device's own holdout, and so is what is served now, on the same samples. Nothing is
switched here: the winner is installed in the slot that does not serve, and the daemon switches.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import zstandard

from reft_edge.agent.confinement import forget_peak_memory, peak_memory_bytes
from reft_edge.agent.protocol import CheckModel, Configure, ModelChecked, ModelNotTaken
from reft_edge.agent.serving.deployment_words import Reproach
from reft_edge.agent.serving.judgement import NotTaken, judge
from reft_edge.agent.serving.latency import QUICK, Latency, measure_latency
from reft_edge.agent.serving.onnx_model import OnnxModel, without_answer
from reft_edge.agent.serving.slots import CHECK, SERVING, InstalledModel, Slot, Slots
from reft_edge.agent.training import split_seed
from reft_edge.data.dataset import Dataset, map_classes
from reft_edge.data.load import load_dataset
from reft_edge.errors import BundleError, DataError, ModelError, ReftError, ResourceError
from reft_edge.wire.blobs import RESERVED_FREE_BYTES, BlobStore
from reft_edge.wire.deployment import Deploy, Health, ModelFile

MAX_CHECKED_SAMPLES = 1000
"""Of a larger holdout an even choice: an accuracy of 0.5 has a standard error of 1.6% then, and a slow board is not
busy for an hour."""

_N_AT_ONCE = 256
"""Samples whose outputs are held at a time."""

_READ_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class CheckError(ReftError):
    """The model cannot be checked; `kind` is what the coordinator is told. `refused`: it asks for too much."""

    def __init__(self, kind: Reproach, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.kind: Reproach = kind
        self.refused = refused


class DamagedError(ReftError):
    """A blob in the spool is not what its SHA-256 says; it was removed."""


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """An ONNX file as it would be served."""

    file: ModelFile
    path: Path
    sha256: str


def check_model(configure: Configure, command: CheckModel) -> ModelChecked | ModelNotTaken:
    """Check, and install what passes. Raises `CheckError` and `DamagedError`; what serves is untouched in any case."""
    spool = Path(configure.spool)
    folder = spool / SERVING / CHECK
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        candidates = [_unpack(file, BlobStore(spool / "blobs"), folder) for file in command.deploy.files]
        return _check(configure, command.deploy, candidates, Slots(spool / SERVING))
    except (MemoryError, ResourceError) as exc:
        raise CheckError("memory", str(exc) or "the device has not enough memory for it", refused=True) from exc
    except DataError as exc:
        raise CheckError("data", str(exc)) from exc
    except (BundleError, ModelError) as exc:
        raise CheckError("bundle", str(exc)) from exc
    except OSError as exc:
        raise CheckError("storage", f"{folder}: {exc.strerror or exc}; free some space, and deploy again") from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(file: ModelFile, blobs: BlobStore, folder: Path) -> _Candidate:
    """Decompress a blob into `folder`, a piece at a time, and no further than the deployment says."""
    blob = blobs.path(file.blob.sha256)
    with blob.open("rb") as source:
        if hashlib.file_digest(source, "sha256").hexdigest() != file.blob.sha256:
            blobs.remove(file.blob.sha256)
            raise DamagedError(f"blob {file.blob.sha256[:12]}… was damaged on disk")
    if file.size_bytes > shutil.disk_usage(folder).free - RESERVED_FREE_BYTES:
        raise CheckError("storage", f"{folder}: no room for another model of {file.size_bytes} bytes; free some space")
    path = folder / f"{file.precision}.onnx"
    digest, size = hashlib.sha256(), 0
    try:
        with blob.open("rb") as source, path.open("wb") as target:
            reader = zstandard.ZstdDecompressor().stream_reader(source)
            while size <= file.size_bytes and (piece := reader.read(_READ_BYTES)):
                size += len(piece)
                digest.update(piece)
                target.write(piece)
    except zstandard.ZstdError as exc:
        raise BundleError(f"the {file.precision} file is not a sound zstandard frame: {exc}") from exc
    if size != file.size_bytes:
        raise BundleError(f"the {file.precision} file does not have the {file.size_bytes} bytes that were announced")
    return _Candidate(file=file, path=path, sha256=digest.hexdigest())


def _check(
    configure: Configure, deploy: Deploy, candidates: Sequence[_Candidate], slots: Slots
) -> ModelChecked | ModelNotTaken:
    timed = _time_all(candidates, deploy)
    holdout = _Holdout(configure)
    scores = [holdout.score(_open(each.candidate, deploy)) for each in timed]
    before = _score_served(slots.current(), holdout)
    measured = tuple(_health(each, score, before) for each, score in zip(timed, scores, strict=True))
    verdict = judge(
        measured,
        deploy.rules,
        accuracy=scores[0].is_accuracy,
        test_metrics={file.precision: file.test_metric for file in deploy.files},
    )
    if isinstance(verdict, NotTaken):
        return ModelNotTaken(
            deployment=deploy.deployment,
            model=deploy.model,
            refused=True,
            kind=verdict.kind,
            reason=verdict.reason,
            health=measured,
        )
    winner = next(each for each in candidates if each.file.precision == verdict.precision)
    _install(winner, deploy, holdout.classes, slots)
    return ModelChecked(deployment=deploy.deployment, model=deploy.model, health=measured)


def _open(candidate: _Candidate, deploy: Deploy) -> OnnxModel:
    called = f"the {candidate.file.precision} file of {deploy.version} ({deploy.model})"
    return OnnxModel(candidate.path, classes=deploy.classes, called=called)


@dataclass(frozen=True, kw_only=True)
class _Timed:
    candidate: _Candidate
    latency: Latency
    peak_memory_bytes: int


def _time_all(candidates: Sequence[_Candidate], deploy: Deploy) -> list[_Timed]:
    """Time each file on one sample. One that cannot be used is left out where another can; else raises `ModelError`."""
    timed: list[_Timed] = []
    problems: list[ModelError] = []
    for each in candidates:
        forget_peak_memory()
        try:
            model = _open(each, deploy)
            sample = np.random.default_rng(0).random((1, *model.sample_shape)).astype(model.dtype)
            latency = measure_latency(partial(model.run, sample), effort=QUICK)
        except ModelError as exc:
            logger.warning("%s", exc)
            problems.append(exc)
        else:
            timed.append(_Timed(candidate=each, latency=latency, peak_memory_bytes=peak_memory_bytes()))
            del model  # one at a time in memory
    if not timed:
        raise problems[0]
    return timed


@dataclass(frozen=True, kw_only=True)
class _Score:
    """`metric` is None where there are no samples, or where an answer is no number."""

    n_samples: int
    metric: float | None
    is_accuracy: bool


class _Holdout:
    """The device's held out samples: the same ones for every model, read again only where a model takes others."""

    def __init__(self, configure: Configure) -> None:
        self._configure = configure
        self._key: tuple[object, ...] | None = None
        self._data: Dataset | None = None
        self.classes: tuple[str, ...] = ()
        """Those that targets are counted in: of the first model that was scored."""

    def score(self, model: OnnxModel) -> _Score:
        """Raises `DataError` when the device's data do not fit the model."""
        if self._key is None:
            self.classes = model.classes
        data = _renumbered(self._read(model), self.classes, model.classes)
        return _Score(n_samples=len(data), metric=_metric(model, data), is_accuracy=model.is_classifier)

    def _read(self, model: OnnxModel) -> Dataset:
        key = (model.sample_shape, model.dtype.kind, model.is_classifier, model.output_shape)
        if self._data is None or key != self._key:
            self._data = None  # never hold both
            settings = self._configure.data
            dataset = load_dataset(
                settings,
                base_dir=Path(self._configure.base_dir),
                input_shape=model.sample_shape,
                classes=self.classes,
                compact=True,
            ).for_model(
                input_shape=model.sample_shape,
                input_dtype="float32" if model.dtype.kind == "f" else "int64",
                target_shape=() if model.is_classifier else model.output_shape,
                target_dtype="int64" if model.is_classifier else "float32",
            )
            _, holdout = dataset.split(settings.holdout_fraction, split_seed(self._configure.device))
            self._data, self._key = _even_choice(holdout), key
        return self._data


def _even_choice(data: Dataset) -> Dataset:
    if len(data) <= MAX_CHECKED_SAMPLES:
        return data
    return data.take(np.linspace(0, len(data) - 1, MAX_CHECKED_SAMPLES).astype(np.int64))


def _renumbered(data: Dataset, own: tuple[str, ...], model: tuple[str, ...]) -> Dataset:
    """`data` with class indices as the model counts them. Raises `DataError` for a class that it does not know."""
    if data.targets is None or own == model or not own or not model:
        return data
    used = np.unique(data.targets)
    table = np.zeros(len(own), dtype=np.int64)
    table[used] = map_classes([own[index] for index in used], model, where="held out samples")
    return replace(data, targets=table[data.targets], classes=model)


def _metric(model: OnnxModel, data: Dataset) -> float | None:
    """Accuracy of a classifier, else the mean squared error over all elements."""
    if data.targets is None or len(data) == 0:
        return None
    total = 0.0
    for start in range(0, len(data), _N_AT_ONCE):
        which = slice(start, start + _N_AT_ONCE)
        outputs, targets = model.run(data.inputs[which]), data.targets[which]
        if len(without_answer(model.answers(outputs))):
            return None
        if not model.is_classifier:
            total += float(np.square(outputs - targets, dtype=np.float64).reshape(len(targets), -1).mean(axis=1).sum())
        elif targets.max() < outputs.shape[1]:
            total += float((outputs.argmax(axis=1) == targets).sum())
        else:
            raise DataError(f"class {targets.max()} is outside the model's 0 to {outputs.shape[1] - 1}")
    mean = total / len(data)
    return mean if math.isfinite(mean) else None


def _score_served(served: InstalledModel | None, holdout: _Holdout) -> _Score | None:
    """What is served now on the same samples; None where it cannot be compared."""
    if served is None or not served.verified():
        return None
    try:
        return holdout.score(OnnxModel(served.path, classes=served.slot.classes, called=served.slot.version))
    except (ModelError, DataError) as exc:
        logger.warning("what is served now is not compared with: %s", exc)
        return None


def _health(timed: _Timed, score: _Score, before: _Score | None) -> Health:
    comparable = before is not None and before.is_accuracy == score.is_accuracy
    return Health(
        precision=timed.candidate.file.precision,
        holdout_samples=score.n_samples,
        metric=score.metric,
        metric_before=before.metric if before is not None and comparable else None,
        latency_p50_s=timed.latency.p50_s,
        latency_p95_s=timed.latency.p95_s,
        latency_p99_s=timed.latency.p99_s,
        peak_memory_bytes=timed.peak_memory_bytes,
    )


def _install(winner: _Candidate, deploy: Deploy, classes: tuple[str, ...], slots: Slots) -> None:
    slot = Slot(
        version=deploy.version,
        deployment=deploy.deployment,
        model=deploy.model,
        precision=winner.file.precision,
        sha256=winner.sha256,
        size_bytes=winner.file.size_bytes,
        classes=classes,
    )
    try:
        slots.install(slot, winner.path)
    except ResourceError as exc:
        raise CheckError("storage", str(exc)) from exc
