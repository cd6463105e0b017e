"""The training step and the matrix product that devices are measured with.

All devices run the same graphs, shipped with the package in reft_edge/profiling/ and made by
scripts/make_reference_step: training steps of a small VGG-like network and of one with a quarter of its channels,
compiled as every model of a federation is, and a square float32 matrix product. Weights are drawn here and not shipped;
arithmetic takes the same time whatever the numbers are, as long as they do not vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from reft_edge.agent.trainer import Trainer
from reft_edge.bundle.bundle import INFERENCE_FILE, MANIFEST_FILE, TRAINING_FILE, Bundle, blob_ref, graph_bytes
from reft_edge.bundle.container import pack_tensors
from reft_edge.bundle.manifest import Manifest, TensorSpec
from reft_edge.profiling.reference import REFERENCE_BATCH_SIZE, REFERENCE_FOLDER
from reft_edge.profiling.speed import TimedStep

if TYPE_CHECKING:
    from reft_edge.types import Array

SMALL_BATCH_SIZE = 16
"""The narrow step on it spends a good part of its time on calls. Not fewer samples: kernels compute so many columns
together, and below it time does not fall as the count says."""

PRODUCT_SIZE = 512
"""Rows and columns of the matrix product: 3 MiB, so that it computes rather than waits for memory."""

PRODUCT_FILE = "matrix_product.onnx.zst"
FOLDER = f"profiling/{REFERENCE_FOLDER}"
NARROW_FOLDER = "profiling/narrow_step"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Something to repeat, and the floating-point operations of one run (a multiply-accumulate counts as 2)."""

    run: Callable[[], object]
    flops: float
    description: str


@dataclass(frozen=True, kw_only=True)
class StepWorkload(Workload):
    """A training step to repeat, and what it counts."""

    manifest: Manifest
    batch_size: int

    def timed(self, seconds: float) -> TimedStep:
        """The step as one that took `seconds`. Raises `ValueError` for a manifest that does not count its work."""
        work = self.manifest.cost.step_work
        if work is None:
            raise ValueError(f"{self.manifest.model!r} does not count its work; run scripts/make_reference_step")
        return TimedStep(
            product_flops=work.product_flops(self.batch_size),
            moved_bytes=work.moved_bytes(self.batch_size),
            calls=work.calls,
            seconds=seconds,
        )


def reference_bundle(name: str = FOLDER) -> Bundle:
    """A shipped training step with weights drawn for it."""
    folder = files("reft_edge") / name
    manifest = Manifest.from_json((folder / MANIFEST_FILE).read_bytes())
    rng = np.random.default_rng(0)
    weights = pack_tensors({spec.name: _draw(spec, rng) for spec in manifest.tensors})
    return Bundle(
        manifest=msgspec.structs.replace(manifest, weights=blob_ref(weights)),
        training_graph=(folder / TRAINING_FILE).read_bytes(),
        inference_graph=(folder / INFERENCE_FILE).read_bytes(),
        weights=weights,
    )


def training_steps(*, threads: int) -> tuple[StepWorkload, ...]:
    """The steps that rates are fitted to; the first is the reference step."""
    cases = ((FOLDER, REFERENCE_BATCH_SIZE), (NARROW_FOLDER, REFERENCE_BATCH_SIZE), (FOLDER, SMALL_BATCH_SIZE),
             (NARROW_FOLDER, SMALL_BATCH_SIZE))  # fmt: skip
    trainers = {name: Trainer(reference_bundle(name), threads=threads) for name in (FOLDER, NARROW_FOLDER)}
    return tuple(_training_step(trainers[name], batch_size) for name, batch_size in cases)


def _training_step(trainer: Trainer, batch_size: int) -> StepWorkload:
    """One training step on a fixed batch."""
    manifest = trainer.manifest
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((batch_size, *manifest.input.shape), dtype=np.float32)
    targets = rng.integers(0, manifest.output.shape[-1], batch_size)
    return StepWorkload(
        # A learning rate this small leaves the weights what they are, so that nothing diverges however long it runs.
        run=lambda: trainer.step(inputs, targets, learning_rate=1e-6),
        flops=float(manifest.cost.step_flops(batch_size)),
        description=f"training steps of {manifest.model}, batch {batch_size}",
        manifest=manifest,
        batch_size=batch_size,
    )


def matrix_product(*, threads: int) -> Workload:
    """A float32 matrix product in onnxruntime, which is what training spends most of its time on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    graph = graph_bytes((files("reft_edge") / FOLDER / PRODUCT_FILE).read_bytes())
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(2)
    left, right = (rng.standard_normal((PRODUCT_SIZE, PRODUCT_SIZE), dtype=np.float32) for _ in range(2))
    return Workload(
        run=lambda: session.run(None, {"left": left, "right": right}),
        flops=2.0 * PRODUCT_SIZE**3,
        description=f"matrix product {PRODUCT_SIZE} x {PRODUCT_SIZE} in onnxruntime {onnxruntime.__version__}",
    )


def _draw(spec: TensorSpec, rng: np.random.Generator) -> Array:
    """Values as a fresh network has them: He's normal weights, running variances of 1, the rest 0.

    He, Zhang, Ren, Sun, arXiv 1502.01852, equation 10.
    """
    dtype: np.dtype[Any] = np.dtype(spec.dtype)
    if spec.name.endswith("running_var") or (len(spec.shape) == 1 and spec.name.endswith("weight")):
        return np.ones(spec.shape, dtype)
    if len(spec.shape) < 2:
        return np.zeros(spec.shape, dtype)
    fan_in = spec.n_elements / spec.shape[0]
    weights: Array = (rng.standard_normal(spec.shape) * np.sqrt(2 / fan_in)).astype(dtype)
    return weights
