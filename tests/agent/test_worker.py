"""Supervisor and worker as real processes: the update is right, and every way to fail has its answer."""

from __future__ import annotations

import os
import queue
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest

from reft_edge.agent.protocol import (
    Cancel,
    Configure,
    DataDescribed,
    DataRefused,
    DescribeData,
    Finished,
    Stopped,
    TaskFailed,
    Train,
    TrainingProgress,
)
from reft_edge.agent.session_words import Residual
from reft_edge.agent.settings import Limits
from reft_edge.agent.spool import Spool
from reft_edge.agent.supervisor import Supervisor, WorkerEnded, WorkerSaid, explain_end
from reft_edge.agent.trainer import Trainer
from reft_edge.agent.training import derive_seed, split_seed
from reft_edge.bundle.bundle import Bundle
from reft_edge.bundle.container import unpack_tensors
from reft_edge.data.dataset import batches
from reft_edge.data.load import load_dataset
from reft_edge.data.settings import DataSettings
from reft_edge.wire.codec_names import Float32, TopK
from reft_edge.wire.codecs import decode_tensors, encode_tensors
from reft_edge.wire.compensation.methods import decode_update
from reft_edge.wire.compensation_names import EControlOptions, EF21Options, ErrorFeedbackOptions
from reft_edge.wire.messages import Task, TrainingPlan, WeightsRef

TIMEOUT_S = 60.0
PLAN = TrainingPlan(local_epochs=2, batch_size=16, learning_rate=0.1, learning_rate_schedule="cosine", seed=11)

Said = TypeVar("Said")


class Bench:
    """A supervisor with its events, and a spool with a bundle in it."""

    def __init__(self, directory: Path, bundle: Bundle, data: DataSettings, limits: Limits) -> None:
        self.spool = Spool(directory / "spool", max_blob_bytes=2**30)
        self.bundle = bundle
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.supervisor = Supervisor(
            Configure(device="dev", data=data, base_dir=str(directory), spool=str(self.spool.root), limits=limits),
            self.events,
        )

    def task(self, name: str = "t", plan: TrainingPlan = PLAN, bundle: Bundle | None = None) -> Task:
        bundle = bundle or self.bundle
        put = self.spool.blobs.put
        put(bundle.training_graph)
        put(bundle.inference_graph)
        weights = WeightsRef(blob=put(encode_tensors(bundle.tensors(), Float32())))
        manifest = put(bundle.manifest.to_json())
        return Task(task=name, round=0, run="r", bundle=manifest, weights=weights, plan=plan, deadline=0.0)

    def train(self, task: Task, residual: Residual | None = None) -> None:
        self.supervisor.send(Train(task=task, residual=residual, asked_at=time.monotonic()))

    def hear(self, *kinds: type[Said]) -> Said:
        """The next event of one of the kinds, looking into what the worker said."""
        while True:
            event = self.events.get(timeout=TIMEOUT_S)
            if isinstance(event, WorkerSaid) and not isinstance(event.answer, (TrainingProgress, *kinds)):
                raise AssertionError(f"unexpected: {event}")
            found = event.answer if isinstance(event, WorkerSaid) else event
            if isinstance(found, kinds):
                return found

    def update(self, finished: Finished) -> dict[str, np.ndarray]:
        data = self.spool.blobs.read(finished.update.blob)
        return decode_tensors(data, finished.update.codec, self.bundle.manifest.tensors)


@pytest.fixture
def make_bench(tmp_path: Path, bundle: Bundle, data_file: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(data: DataSettings | None = None, **limits: Any) -> Bench:
        settings = data or DataSettings(path=data_file.name)
        made.append(Bench(tmp_path, bundle, settings, Limits(threads=1, nice=0, **limits)))
        return made[-1]

    yield make
    for bench in made:
        bench.supervisor.stop()


def reference_update(bench: Bench) -> dict[str, np.ndarray]:
    """What the worker should send: the same training, written out."""
    data = load_dataset(DataSettings(path="data.npz"), base_dir=bench.spool.root.parent)
    training, _ = data.split(0.2, split_seed("dev"))
    seed = derive_seed("dev", str(PLAN.seed))
    trainer = Trainer(bench.bundle, threads=1, seed=seed)
    rng = np.random.default_rng(seed)
    step = 0
    for _ in range(2):
        for inputs, targets in batches(training, 16, rng):
            trainer.step(inputs, targets, learning_rate=0.1 * 0.5 * (1 + np.cos(np.pi * step / 6)))
            step += 1
    return {name: trainer.state()[name] - before for name, before in bench.bundle.tensors().items()}


def test_the_update_is_what_training_changed_cold_or_warm(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    exact = msgspec.structs.replace(PLAN, update_codec=Float32())
    bench.train(bench.task("cold", exact))
    cold = bench.hear(Finished)
    expected = reference_update(bench)
    for name, delta in bench.update(cold).items():
        np.testing.assert_allclose(delta, expected[name], atol=1e-7, err_msg=name)
    assert (cold.update.training_samples, cold.update.holdout_samples, cold.measured.steps) == (48, 12, 6)
    assert cold.update.loss_last < cold.update.loss_first
    assert cold.update.holdout_metric_after >= cold.update.holdout_metric_before
    assert cold.measured.peak_memory_bytes > 2**24
    bench.train(bench.task("warm", exact))
    warm = bench.hear(Finished)
    assert warm.update.blob == cold.update.blob
    assert warm.measured.start_s < cold.measured.start_s


def test_what_quantization_leaves_out_is_in_the_next_update(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.train(bench.task("one"))
    first = bench.hear(Finished)
    assert first.residual is not None
    bench.train(bench.task("two"), first.residual)
    second = bench.hear(Finished)
    expected = reference_update(bench)
    one, two = bench.update(first), bench.update(second)
    for name in ("0.weight", "4.weight"):
        half_step = np.abs(two[name]).max() / 127 / 2
        np.testing.assert_allclose(one[name] + two[name], 2 * expected[name], rtol=0, atol=1.01 * half_step)
        assert not np.array_equal(one[name], two[name])
    # A kill between the residual's writing and the daemon's note of it repeats the task from the old residual.
    bench.train(bench.task("two"), first.residual)
    assert bench.hear(Finished).update.blob == second.update.blob


@pytest.mark.parametrize("method", [EF21Options(), EControlOptions(strength=0.5)])
def test_a_shared_memory_is_the_same_on_both_sides_and_is_named(
    make_bench: Callable[..., Bench], method: EF21Options | EControlOptions
) -> None:
    bench = make_bench()
    plan = msgspec.structs.replace(PLAN, update_codec=TopK(fraction=0.3), compensation=method)
    specs, read = bench.bundle.manifest.tensors, bench.spool.blobs.read

    bench.train(bench.task("one", plan))
    first = bench.hear(Finished)
    assert first.update.memory is None
    assert first.residual is not None
    assert first.residual.update == first.update.blob.sha256
    _, memory = decode_update(method, read(first.update.blob), plan.update_codec, specs, None)

    following = msgspec.structs.replace(bench.task("two", plan), memory=first.update.blob.sha256)
    bench.train(following, first.residual)
    second = bench.hear(Finished)
    assert second.update.memory == first.update.blob.sha256
    update, memory = decode_update(method, read(second.update.blob), plan.update_codec, specs, memory)
    assert second.residual is not None
    packed = (bench.spool.residuals / second.residual.name).read_bytes()
    kept, _ = unpack_tensors(packed, max_bytes=2**24)
    for name, estimate in memory.items():
        prefix = "" if isinstance(method, EF21Options) else "estimate::"
        np.testing.assert_array_equal(kept[prefix + name], estimate)
    expected = reference_update(bench)["4.weight"]
    alone, _ = decode_update(method, read(first.update.blob), plan.update_codec, specs, None)
    assert np.linalg.norm(update["4.weight"] - expected) < np.linalg.norm(alone["4.weight"] - expected)

    # What was kept is lost, or of another method: the update goes on from nothing, and says so.
    (bench.spool.residuals / first.residual.name).unlink()
    bench.train(following, first.residual)
    assert bench.hear(Finished).update.memory is None
    other = msgspec.structs.replace(plan, compensation=ErrorFeedbackOptions())
    bench.train(msgspec.structs.replace(following, plan=other), second.residual)
    assert bench.hear(Finished).update.memory is None


def test_a_cancelled_training_ends_and_the_next_begins(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    endless = msgspec.structs.replace(PLAN, local_epochs=10_000)
    bench.train(bench.task("old", endless))
    assert bench.hear(TrainingProgress).task == "old"
    bench.supervisor.send(Cancel(task="old"))
    bench.train(bench.task("new"))
    assert bench.hear(Stopped).task == "old"
    assert bench.hear(Finished).task == "new"


def test_a_worker_that_is_killed_is_noticed_and_replaced(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.train(bench.task("t", msgspec.structs.replace(PLAN, local_epochs=10_000)))
    bench.hear(TrainingProgress)
    worker = bench.supervisor.worker
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    ended = bench.hear(WorkerEnded)
    assert (ended.worker, ended.kind) == (worker, "crashed")
    assert "SIGKILL" in ended.reason
    bench.supervisor.forget(worker)
    bench.train(bench.task("again"))
    assert bench.hear(Finished).task == "again"


def test_a_model_that_takes_more_than_granted_is_an_answer(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(memory_bytes=40 * 2**20)  # less than the libraries alone
    bench.train(bench.task())
    failed = bench.hear(TaskFailed)
    assert failed.kind == "out_of_memory"
    assert "grants 40 MiB" in failed.reason
    assert bench.hear(WorkerEnded).worker == bench.supervisor.worker


def test_a_worker_that_gets_no_memory_to_begin_with_says_so_and_ends(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.supervisor.send(DescribeData())
    bench.hear(DataDescribed)
    worker = bench.supervisor.worker
    assert worker is not None
    resource.prlimit(worker, resource.RLIMIT_AS, (1, 1))  # not a page more
    bench.train(bench.task())
    assert bench.hear(TaskFailed).kind == "out_of_memory"
    assert bench.hear(WorkerEnded).reason == "the worker ended with exit status 0"


@pytest.mark.parametrize(
    ("plan", "data", "kind", "message"),
    [
        ({"learning_rate": 1000.0}, DataSettings(path="data.npz"), "diverged", "lower the learning rate"),
        ({}, DataSettings(path="elsewhere"), "data", "does not exist"),
        ({}, DataSettings(path="data.npz", shape=(6, 6)), "data", "the model takes"),
        ({}, DataSettings(path="data.npz", labelled=False), "data", "no targets"),
    ],
)
def test_what_cannot_be_trained_is_said_by_kind(
    make_bench: Callable[..., Bench], plan: dict[str, Any], data: DataSettings, kind: str, message: str
) -> None:
    bench = make_bench(data)
    bench.train(bench.task("t", msgspec.structs.replace(PLAN, **{"local_epochs": 200, **plan})))
    failed = bench.hear(TaskFailed)
    assert (failed.kind, message in failed.reason) == (kind, True), failed.reason


def test_damaged_blobs_are_refused(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    task = bench.task()
    bench.spool.blobs.path(task.weights.blob.sha256).write_bytes(b"rubbish")
    bench.train(task)
    assert bench.hear(TaskFailed).kind == "bundle"


def test_data_are_described_and_whatever_the_users_code_prints_does_no_harm(
    make_bench: Callable[..., Bench], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, numpy as np\n"
        "def load():\n    print('loading'); os.write(1, b'noise\\n')\n"
        "    return np.zeros((10, 4)), [0, 1] * 5\n"
        "def fail(): raise ValueError('no sensor')\n"
    )
    bench = make_bench(DataSettings(function="mine:load"))
    bench.supervisor.send(DescribeData())
    described = bench.hear(DataDescribed).description
    assert (described.training_samples, described.holdout_samples, described.n_classes) == (8, 2, 2)
    bench = make_bench(DataSettings(function="mine:fail"))
    bench.supervisor.send(DescribeData())
    assert "no sensor" in bench.hear(DataRefused).reason


@pytest.mark.parametrize(
    ("code", "peak", "oom_killed", "kind"),
    [
        (1, 0, False, "crashed"),
        (-signal.SIGABRT, 50, False, "crashed"),
        (-signal.SIGABRT, 90, False, "out_of_memory"),
        (-signal.SIGKILL, 50, True, "out_of_memory"),
        (-signal.SIGSEGV, 50, True, "crashed"),
    ],
)
def test_a_death_is_explained_by_signal_and_memory(code: int, peak: int, oom_killed: bool, kind: str) -> None:
    assert explain_end(code, peak_bytes=peak, limit_bytes=100, oom_killed=oom_killed)[0] == kind
