"""Which models a version has, and their files as they travel.

A version is a finished run, whose exported models are its models, or one ONNX file of a person's own. Each file goes
into the blob store as a zstandard frame, whole: reading one takes its size in memory twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.bundle.container import compress
from reft_edge.bundle.manifest import Cost, Manifest
from reft_edge.config import did_you_mean
from reft_edge.coordinator.deploying.choosing import Candidate, model_of_variant
from reft_edge.coordinator.deploying.onnx_file import OnnxFacts, read_onnx_facts
from reft_edge.coordinator.records import ExportRecord, ReleasedModel, RunRecord
from reft_edge.errors import BundleError, ConfigError, FederationError, ModelError
from reft_edge.wire.deployment import ModelFile
from reft_edge.wire.topics import check_name

if TYPE_CHECKING:
    from reft_edge.coordinator.settings import ModelSettings
    from reft_edge.coordinator.store import Store
    from reft_edge.wire.blobs import BlobStore

INT8_SUFFIX = ".int8"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Release:
    """A version, ready to go out: its files are in the blob store."""

    version: str
    run: str = ""
    """The run whose models these are; empty for a file of one's own."""
    candidates: tuple[Candidate, ...]
    """The largest first."""
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    """Of one sample; empty where the files leave it open."""

    @property
    def models(self) -> tuple[ReleasedModel, ...]:
        return tuple(candidate.model for candidate in self.candidates)


@dataclass(frozen=True, kw_only=True)
class _ReadFile:
    """One ONNX file, in the blob store."""

    file: ModelFile
    sha256: str
    facts: OnnxFacts


def choose_run(store: Store, federation: str, wanted: str | None) -> RunRecord:
    """The finished run that is called so, or the latest. Raises `ConfigError` or `FederationError`."""
    runs = store.runs(federation)
    finished = [run for run in runs if run.state == "finished"]
    if wanted is None:
        if not finished:
            state = f"run {runs[0].run} is {runs[0].state}" if runs else "nothing was ever run"
            raise FederationError(
                f"federation {federation!r} has no finished run to deploy ({state}); bring one to its end with "
                "reft-edge coordinator, or deploy a model of your own with --file MODEL.onnx --as NAME"
            )
        return finished[0]
    for run in runs:
        if run.run == wanted and run.state != "finished":
            raise FederationError(f"run {wanted} is {run.state}; a run is deployed when it has finished")
        if run.run == wanted:
            return run
    meant = did_you_mean(wanted, [run.run for run in finished]) if finished else "; it has no finished run"
    raise ConfigError(f"federation {federation!r} has no version {wanted!r}{meant}")


def release_run(store: Store, blobs: BlobStore, run: str, model: ModelSettings, *, version: str = "") -> Release:
    """The models that a finished run has exported. Raises `ModelError` where files are missing or were changed.

    `version`: what it is called; as the run, if nothing else is said.
    """
    check_name(version or run, "version")
    exports: dict[str, list[ExportRecord]] = defaultdict(list)
    for record in store.exports(run):
        exports[record.name.removesuffix(INT8_SUFFIX)].append(record)
    if not exports:
        raise FederationError(f"run {run} has exported no model; there is nothing to deploy")
    costs = _costs(store, blobs, run)
    read = {name: [_read_export(one, run, blobs) for one in _float_first(files)] for name, files in exports.items()}
    candidates = []
    for name, files in read.items():
        candidates.append(
            Candidate(
                model=_model(name, files),
                cost=costs[name].cost if name in costs else None,
                sample_bytes=costs[name].sample_bytes if name in costs else 0,
                score=_score(exports[name]),
            )
        )
    facts = next(iter(read.values()))[0].facts
    ratios = {name: files[0].values.get("ratio", 0.0) for name, files in exports.items()}
    return Release(
        version=version or run,
        run=run,
        candidates=tuple(sorted(candidates, key=lambda one: (ratios[one.name], -one.size_bytes, one.name))),
        classes=facts.classes or model.classes,
        input_shape=facts.input_shape,
    )


def release_file(path: Path, version: str, blobs: BlobStore, model: ModelSettings) -> Release:
    """An ONNX file of one's own. Raises `ConfigError` or `ModelError` when it does not fit the federation."""
    check_name(version, "version")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"model {path} cannot be read: {exc.strerror or exc}") from exc
    read = _put(data, "float32", blobs, called=path.name)
    facts = read.facts
    if facts.input_shape and facts.input_shape != model.input_shape:
        raise ModelError(
            f"{path.name} takes samples of shape {facts.input_shape}, the federation's are {model.input_shape}"
        )
    classes = facts.classes or model.classes
    n_outputs = len(facts.classes) or facts.n_outputs
    if n_outputs is not None and not facts.classes and n_outputs != model.outputs:
        raise ModelError(f"{path.name} gives {n_outputs} outputs for a sample, the federation has {model.outputs}")
    if missing := sorted(set(model.classes) - set(classes)):
        raise ModelError(f"{path.name} does not know the class {missing[0]!r}, which devices' data may have")
    if facts.classes and model.classes and facts.classes != model.classes:
        _log.warning("%s has classes %s; devices map theirs to these by name", path.name, ", ".join(facts.classes))
    released = _model(version, [read])
    return Release(
        version=version,
        candidates=(Candidate(model=released, score=facts.test_metric),),
        classes=classes,
        input_shape=facts.input_shape or model.input_shape,
    )


def _read_export(record: ExportRecord, run: str, blobs: BlobStore) -> _ReadFile:
    path = Path(record.path)
    again = "deploy another version, or take the file out of a backup"
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror or exc}; {again}") from exc
    metric = record.values.get("accuracy", record.values.get("mse"))
    precision = "int8" if record.name.endswith(INT8_SUFFIX) else "float32"
    if _was_changed(data, record):
        raise ModelError(
            f"{path} was changed after run {run} had exported it; {again}, or give it with --file and --as"
        )
    read = _put(data, precision, blobs, called=path.name, metric=metric)
    if read.facts.run not in ("", run):
        raise ModelError(f"{path} is a file of run {read.facts.run} and not of {run}; {again}")
    return read


def _was_changed(data: bytes, record: ExportRecord) -> bool:
    """Of a run from before hashes were kept, as far as its size shows it."""
    if record.sha256:
        return hashlib.sha256(data).hexdigest() != record.sha256
    return len(data) != record.values.get("size_bytes", len(data))


def _put(data: bytes, precision: str, blobs: BlobStore, *, called: str, metric: float | None = None) -> _ReadFile:
    facts = read_onnx_facts(data, called=called)
    return _ReadFile(
        file=ModelFile(
            blob=blobs.put(compress(data)),
            size_bytes=len(data),
            precision="int8" if precision == "int8" else "float32",
            test_metric=facts.test_metric if metric is None else metric,
        ),
        sha256=hashlib.sha256(data).hexdigest(),
        facts=facts,
    )


def _model(name: str, files: Sequence[_ReadFile]) -> ReleasedModel:
    return ReleasedModel(name=name, files=tuple(one.file for one in files), sha256s=tuple(one.sha256 for one in files))


def _float_first(files: Sequence[ExportRecord]) -> list[ExportRecord]:
    return sorted(files, key=lambda record: record.name.endswith(INT8_SUFFIX))


def _score(files: Sequence[ExportRecord]) -> float | None:
    """The best figure of a model's files on the test data; higher is better."""
    scores = [one.values["accuracy"] for one in files if "accuracy" in one.values]
    scores += [-one.values["mse"] for one in files if "mse" in one.values]
    return max(scores, default=None)


@dataclass(frozen=True, kw_only=True)
class _Counted:
    cost: Cost
    sample_bytes: int


def _costs(store: Store, blobs: BlobStore, run: str) -> dict[str, _Counted]:
    """By model, as far as the manifests are still there: a later run clears them away."""
    found = {}
    for variant in store.variants(run):
        if not blobs.has(variant.manifest.sha256):
            continue
        try:
            manifest = Manifest.from_json(blobs.read(variant.manifest))
        except BundleError as exc:
            _log.warning("variant %s: what it costs is not known any more: %s", variant.variant, exc)
            continue
        found[model_of_variant(variant.variant)] = _Counted(cost=manifest.cost, sample_bytes=manifest.sample_bytes)
    return found
