"""Export a model for deployment: ONNX in float32 and in int8, each with its size and what it scores.

int8 is onnxruntime's static post-training quantization: weights per channel, activations with ranges that public inputs
calibrate, written as QuantizeLinear and DequantizeLinear pairs around the float operators (Jacob et al., arXiv
1712.05877), which every runtime for small devices reads. What an exported file scores is measured on the file itself,
and stands in it with the classes and how inputs are scaled (`file_metadata`).

Training is over when this runs, so a model that onnxruntime cannot quantize still exports as float32 and the reason is
kept. Nothing here is specific to federated learning.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from reft_edge.bundle.inference import INPUTS, ORT_ERRORS, OUTPUTS, first_line
from reft_edge.compile import export_onnx
from reft_edge.coordinator.evaluation import Metrics, measure
from reft_edge.coordinator.file_metadata import Origin, describe, write_metadata
from reft_edge.data.dataset import scale
from reft_edge.errors import ModelError, ResourceError

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import Manifest
    from reft_edge.data.dataset import Dataset
    from reft_edge.types import Array, Tensors

MAX_CALIBRATION_SAMPLES = 512
"""Ranges hardly move after a few hundred samples, and onnxruntime keeps the ranges of every batch in memory."""

BATCH = 64

NOWHERE = Origin()
"""Of models that no federation trained."""

QUANTIZER_ERRORS: tuple[type[Exception], ...] = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    *ORT_ERRORS,
    TypeError,
)
"""What onnxruntime's quantizer raises for models it does not know: it checks little, so it is mostly Python's own."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One ONNX file: input `inputs` (n, *sample_shape), output `outputs`. `metrics` is None without test data."""

    path: Path
    size_bytes: int
    sha256: str
    metrics: Metrics | None


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A model's files. `int8` is None when it was not made; then `int8_problem` says why."""

    name: str
    float32: ExportedFile
    int8: ExportedFile | None
    int8_problem: str = ""


def export_model(
    *,
    name: str,
    manifest: Manifest,
    inference_graph: bytes,
    weights: Tensors,
    directory: Path,
    calibration: Array | None = None,
    test: Dataset | None = None,
    origin: Origin = NOWHERE,
) -> ExportedModel:
    """Write `<name>.onnx` and `<name>.int8.onnx` into `directory`, which is created.

    `calibration`: public inputs (n, *sample_shape); without them there is no int8 file. `test`: labelled samples to
    measure both files on. `origin`: what else the files say about themselves. Raises `ModelError` when the graph cannot
    be exported, `ResourceError` when the disk refuses.
    """
    path = directory / f"{name}.onnx"
    _write(path, export_onnx(manifest, inference_graph, weights))
    known = (calibration, None if test is None else test.inputs)
    pictures = any(inputs is not None and inputs.dtype == np.uint8 for inputs in known)

    def finished(file: Path) -> ExportedFile:
        metrics = _measured(file, test)
        write_metadata(file, describe(origin, manifest, pictures=pictures, metrics=metrics))
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return ExportedFile(path=file, size_bytes=file.stat().st_size, sha256=digest, metrics=metrics)

    float32 = finished(path)
    if calibration is None or len(calibration) == 0:
        return ExportedModel(name=name, float32=float32, int8=None, int8_problem="no public inputs to calibrate with")
    try:
        target = quantize(path, directory / f"{name}.int8.onnx", calibration)
    except ModelError as exc:
        return ExportedModel(name=name, float32=float32, int8=None, int8_problem=str(exc))
    return ExportedModel(name=name, float32=float32, int8=finished(target))


def quantize(source: Path, target: Path, calibration: Array) -> Path:
    """Write the float32 model `source` as int8 to `target`, with activation ranges from `calibration` (n, ...).

    Raises `ModelError` when onnxruntime cannot.
    """
    with tempfile.TemporaryDirectory(prefix="reft-export-", dir=target.parent) as scratch, _without_advice():
        fused, written = Path(scratch) / "fused.onnx", Path(scratch) / "int8.onnx"
        try:
            _fuse(source, fused)
            quantize_static(
                fused,
                written,
                _Samples(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            written.replace(target)
        except QUANTIZER_ERRORS as exc:
            raise ModelError(f"onnxruntime cannot quantize {source.name}: {first_line(exc)}") from exc
        except OSError as exc:
            raise ResourceError(f"{target} cannot be written: {exc.strerror or exc}") from exc
    return target


def run_file(path: Path, inputs: Array) -> Iterator[Array]:
    """Outputs of an exported file, batch by batch. Raises `ModelError` when onnxruntime refuses it."""
    try:
        session = ort.InferenceSession(path, _session_options(), providers=["CPUExecutionProvider"])
        for start in range(0, len(inputs), BATCH):
            (outputs,) = session.run([OUTPUTS], {INPUTS: np.ascontiguousarray(scale(inputs[start : start + BATCH]))})
            yield outputs
    except ORT_ERRORS as exc:
        raise ModelError(f"onnxruntime cannot run {path.name}: {first_line(exc)}") from exc


class _Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Calibration inputs in batches, as onnxruntime asks for them."""

    def __init__(self, inputs: Array) -> None:
        self._inputs = inputs[:MAX_CALIBRATION_SAMPLES]
        self._start = 0

    def get_next(self) -> dict[str, Array] | None:
        start, self._start = self._start, self._start + BATCH
        batch = self._inputs[start : start + BATCH]
        return {INPUTS: np.ascontiguousarray(scale(batch))} if len(batch) else None


def _measured(path: Path, test: Dataset | None) -> Metrics | None:
    if test is None or test.targets is None:
        return None
    return measure(run_file(path, test.inputs), test.targets)


def _fuse(source: Path, target: Path) -> None:
    """Write `source` with batch norms folded into convolutions: they must not be quantized apart."""
    options = _session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as exc:
        raise ResourceError(f"{path} cannot be written: {exc.strerror or exc}") from exc


@contextmanager
def _without_advice() -> Iterator[None]:
    """onnxruntime's quantizer logs advice for its callers through the root logger; drop that, and only that."""

    def foreign(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root = logging.getLogger()
    root.addFilter(foreign)
    try:
        yield
    finally:
        root.removeFilter(foreign)
