"""Predictions against a real worker: the memory that the planner grants must be enough for what the agent does."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from reft_edge.agent.empty_worker import measure_empty_worker
from reft_edge.agent.protocol import Configure, Train
from reft_edge.agent.settings import Limits
from reft_edge.compile import compile_bundle
from reft_edge.coordinator.prediction import Device, Option, Workload, encoded_bytes, predict
from reft_edge.data.settings import DataSettings
from reft_edge.models.registry import ZOO, build_model
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.messages import Measured, Task, TrainingPlan, WeightsRef

WORKER = """
import sys, msgspec
from reft_edge.agent.protocol import Configure, Train
from reft_edge.agent.task_runner import TaskRunner
configure, train = (msgspec.json.decode(text, type=kind) for text, kind in zip(sys.argv[1:], (Configure, Train)))
measured = TaskRunner(configure).run(train, lambda done, total, loss: None).measured
print(msgspec.json.encode(measured).decode())
"""


def run_worker(tmp_path: Path, model: str, workload: Workload, n_samples: int) -> tuple[Option, Measured]:
    """Compile `model`, train it in a process of its own as the agent does, and return what it measured."""
    shape, n_outputs = ZOO[model].input_shape, ZOO[model].n_outputs
    bundle = compile_bundle(build_model(model, input_shape=shape, n_outputs=n_outputs), input_shape=shape)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(n_samples, *shape)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=rng.integers(0, n_outputs, n_samples))
    blobs = BlobStore(tmp_path / "spool" / "blobs")
    (tmp_path / "spool" / "residuals").mkdir()
    for graph in (bundle.training_graph, bundle.inference_graph):
        blobs.put(graph)
    task = Task(
        task="t",
        round=1,
        run="r",
        bundle=blobs.put(bundle.manifest.to_json()),
        weights=WeightsRef(
            blob=blobs.put(encode_tensors(bundle.tensors(), workload.weights_codec)), codec=workload.weights_codec
        ),
        plan=TrainingPlan(
            local_epochs=workload.local_epochs,
            batch_size=workload.batch_size,
            learning_rate=0.01,
            seed=0,
            update_codec=workload.update_codec,
        ),
        deadline=0,
    )
    configure = Configure(
        device="d",
        data=DataSettings(path="data.npz"),
        base_dir=str(tmp_path),
        spool=str(tmp_path / "spool"),
        limits=Limits(threads=2),
    )
    train = Train(task=task, asked_at=time.monotonic())
    arguments = [msgspec.json.encode(message).decode() for message in (configure, train)]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    option = Option.of(bundle.manifest, ratio=0.0, workload=workload)
    weights = encoded_bytes(bundle.manifest.tensors, workload.weights_codec)
    assert 0.85 * weights < task.weights.blob.size_bytes <= weights
    return option, msgspec.json.decode(done.stdout, type=Measured)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("model", "batch_size"), [("mlp", 16), ("resnet_small", 16)])
def test_a_worker_takes_no_more_memory_than_predicted_and_not_much_less(
    tmp_path: Path, model: str, batch_size: int
) -> None:
    workload = Workload(local_epochs=1, batch_size=batch_size, deadline_s=60.0)
    n_samples = 8 * batch_size  # so that the holdout has a batch of its own
    option, measured = run_worker(tmp_path, model, workload, n_samples)
    worker = measure_empty_worker()
    assert worker is not None
    value = {name: Quantity(value=float(number), basis="measured") for name, number in
             (("cores", 2), ("clock_hz", 1e9), ("flops_per_cycle", 8), ("memory_total_bytes", 2**33),
              ("runtime_base_bytes", worker.resident_bytes))}  # fmt: skip
    device = Device(device="d", profile=DeviceProfile(name="here", **value), training_samples=n_samples)
    predicted = predict(device, option, workload)
    assert predicted.steps >= measured.steps
    assert 0.8 * predicted.peak_memory_bytes < measured.peak_memory_bytes <= predicted.peak_memory_bytes
