"""What a model costs on this board: time of one sample, samples a second, memory, and how warm the board becomes.

One model a process: what the allocator keeps of a first one would count as the second one's memory.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.agent.serving.latency import Effort, measure_latency
from reft_edge.agent.serving.onnx_model import OnnxModel
from reft_edge.agent.serving.predictor import Predictor
from reft_edge.data.load import load_dataset
from reft_edge.data.settings import DataSettings
from reft_edge.errors import DataError
from reft_edge.profiling.load import read_load
from reft_edge.profiling.memory import proportional_bytes
from reft_edge.profiling.thermal import read_thermal

if TYPE_CHECKING:
    from reft_edge.data.dataset import Dataset
    from reft_edge.types import Array

_MOST_RUNS = 20_000
"""Of the fastest models the time ends it, too."""


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    batch: int
    per_s: float
    """Samples, not batches."""


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model. None: not measured, or the board does not tell."""

    name: str
    version: str
    threads: int
    inputs: str
    """What was predicted: `random`, or where it comes from."""
    load_s: float
    """From the file to the first prediction."""
    latency_p50_s: float
    """Of one sample at a time; so the other percentiles."""
    latency_p95_s: float
    latency_p99_s: float
    runs: int
    throughput: tuple[Throughput, ...]
    pss_bytes: int
    """Proportional memory of the whole process after the largest batch."""
    model_bytes: int
    """By how much it grew with the model."""
    peak_rss_bytes: int
    accuracy: float | None = None
    mse: float | None = None
    """Mean squared error, of a model that predicts numbers."""
    samples: int = 0
    """That `accuracy` or `mse` is of."""
    temperature_before_celsius: float | None = None
    temperature_after_celsius: float | None = None
    throttled: bool | None = None
    others_share: float
    """Of the processors' time, that other processes took meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    threads: int = 1
    batches: tuple[int, ...] = (8, 32)
    seconds: float = 10.0
    """All measurements of a model together: half for one sample at a time, half for the batches."""
    data: DataSettings | None = None
    """Real samples; random ones without."""


def benchmark(source: Path, plan: Plan) -> ModelFigures:
    """Measure what `source` serves: an .onnx file, an agent.toml or a spool. Nothing of it is counted as predicted.

    Raises what `Predictor` and `load_dataset` raise.
    """
    before_bytes, thermal_before, load_before = proportional_bytes(), read_thermal(), read_load()
    begun = time.perf_counter()
    with Predictor(source, threads=plan.threads) as predictor:
        served = predictor.served()
    load_s = time.perf_counter() - begun
    onnx = served.onnx
    dataset = None if plan.data is None else _real_samples(plan.data, onnx)
    inputs = _random_samples(onnx, max(plan.batches, default=1)) if dataset is None else dataset.inputs
    one = onnx.checked(inputs[:1])
    latency = measure_latency(lambda: onnx.run(one), effort=Effort(runs=_MOST_RUNS, max_s=plan.seconds / 2))
    each_s = plan.seconds / 2 / max(1, len(plan.batches))
    throughput = tuple(_throughput(onnx, inputs, batch, each_s) for batch in plan.batches)
    after_bytes = proportional_bytes()
    thermal = read_thermal().since(thermal_before)
    accuracy, mse = (None, None) if dataset is None else _quality(onnx, dataset)
    return ModelFigures(
        name=str(source),
        version=served.version,
        threads=plan.threads,
        inputs="random" if plan.data is None else plan.data.path,
        load_s=load_s,
        latency_p50_s=latency.p50_s,
        latency_p95_s=latency.p95_s,
        latency_p99_s=latency.p99_s,
        runs=latency.runs,
        throughput=throughput,
        pss_bytes=after_bytes,
        model_bytes=max(0, after_bytes - before_bytes),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        accuracy=accuracy,
        mse=mse,
        samples=0 if dataset is None else len(dataset),
        temperature_before_celsius=thermal_before.temperature_celsius,
        temperature_after_celsius=thermal.temperature_celsius,
        throttled=thermal.throttled,
        others_share=read_load().others_since(load_before),
    )


def _throughput(onnx: OnnxModel, inputs: Array, batch: int, max_s: float) -> Throughput:
    samples = onnx.checked(np.resize(inputs, (batch, *onnx.sample_shape)))
    effort = Effort(runs=_MOST_RUNS, max_s=max_s)
    found = measure_latency(lambda: onnx.run(samples, batch_size=batch), n_samples=batch, effort=effort)
    return Throughput(batch=batch, per_s=found.per_s)


def _random_samples(onnx: OnnxModel, n_samples: int) -> Array:
    """Pictures between 0 and 1, other numbers around 0; of indices zeros, since nobody knows how many there are."""
    rng = np.random.default_rng(0)
    shape = (n_samples, *onnx.sample_shape)
    if onnx.dtype.kind != "f":
        return np.zeros(shape, onnx.dtype)
    return (rng.random(shape) if onnx.takes_pictures else rng.standard_normal(shape)).astype(onnx.dtype)


def _real_samples(settings: DataSettings, onnx: OnnxModel) -> Dataset:
    """With labels in the order of the model's classes."""
    return load_dataset(settings, base_dir=Path(), input_shape=onnx.sample_shape, classes=onnx.classes, compact=True)


def _quality(onnx: OnnxModel, dataset: Dataset) -> tuple[float | None, float | None]:
    """Accuracy or mean squared error; neither without targets. Raises `DataError` for targets of another kind."""
    if dataset.targets is None:
        return None, None
    outputs = onnx.run(onnx.checked(dataset.inputs))
    if onnx.is_classifier:
        if dataset.targets.dtype.kind != "i":
            raise DataError("the model predicts classes, but the targets are numbers; name a column of classes")
        return float(np.mean(outputs.argmax(axis=1) == dataset.targets)), None
    targets = dataset.targets.reshape(outputs.shape) if dataset.targets.size == outputs.size else None
    if targets is None:
        raise DataError(f"a target has shape {dataset.targets.shape[1:]}, the model's output {onnx.output_shape}")
    return None, float(np.mean((outputs.astype(np.float64) - targets) ** 2))
