"""The worker's check: what a device measures of a model, and what every kind of bad file comes to."""

from __future__ import annotations

import os
import queue
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from reft_edge.agent.jobs import JobEnded, Jobs, check_event
from reft_edge.agent.protocol import CheckModel, Configure, ModelChecked, ModelNotTaken
from reft_edge.agent.serving import check
from reft_edge.agent.serving.check import CheckError, DamagedError, check_model
from reft_edge.agent.serving.deployment_words import CheckNotPassed, CheckPassed
from reft_edge.agent.serving.slots import CHECK, SERVING, Slots
from reft_edge.agent.settings import Limits
from reft_edge.agent.supervisor import Supervisor, WorkerEnded, WorkerSaid
from reft_edge.bundle.container import compress
from reft_edge.data.settings import DataSettings
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.deployment import Deploy, HealthRules
from tests.agent.serving.models import brightness_model, deployment, hungry_model, is_model, spoil

GOOD = brightness_model()
OTHER = brightness_model(wrong=0.01)
BAD = brightness_model(wrong=10)

FEW = HealthRules(min_holdout_samples=1)


class Bench:
    """A device's spool, data and worker."""

    def __init__(self, directory: Path, data: str = "data.npz", **limits: Any) -> None:
        self.spool = directory / "spool"
        self.blobs = BlobStore(self.spool / "blobs")
        self.slots = Slots(self.spool / SERVING)
        self.configure = Configure(
            device="dev",
            data=DataSettings(path=data),
            base_dir=str(directory),
            spool=str(self.spool),
            limits=Limits(threads=1, nice=0, **limits),
        )

    def offer(self, *models: bytes, name: str = "one", **other: Any) -> Deploy:
        return deployment(self.blobs, name, *models, **{"rules": FEW, **other})

    def check(self, deploy: Deploy) -> ModelChecked | ModelNotTaken:
        return check_model(self.configure, CheckModel(deploy=deploy))

    def serve(self, *models: bytes, name: str = "one", **other: Any) -> ModelChecked:
        answer = self.check(self.offer(*models, name=name, **other))
        assert isinstance(answer, ModelChecked), answer
        self.slots.switch()
        return answer


@pytest.fixture
def bench(tmp_path: Path, data_file: Path) -> Bench:
    assert data_file.parent == tmp_path
    return Bench(tmp_path)


def test_what_passes_is_installed_and_nothing_is_switched(bench: Bench) -> None:
    answer = bench.check(bench.offer(GOOD, classes=("a", "b", "c")))
    assert isinstance(answer, ModelChecked)
    (health,) = answer.health
    assert (health.metric, health.metric_before, health.holdout_samples) == (1.0, None, 12)
    installed = bench.slots.installed()
    assert is_model(installed, GOOD)
    assert installed is not None
    assert installed.verified()
    assert (installed.slot.version, installed.slot.classes) == ("version-one", ("a", "b", "c"))
    assert bench.slots.current() is None
    assert not (bench.slots.root / CHECK).exists()


def test_of_two_files_the_one_that_measured_better_here_is_installed(bench: Bench) -> None:
    for small, taken in [(GOOD, "int8"), (brightness_model(wrong=1.2), "float32")]:
        large = brightness_model(rounds=40)  # the same answers, later
        answer = bench.serve(large, small, name=taken)
        assert [health.precision for health in answer.health] == ["float32", "int8"]
        assert answer.health[0].latency_p50_s > answer.health[1].latency_p50_s
        current = bench.slots.current()
        assert current is not None
        assert current.slot.precision == taken
        assert is_model(current, small if taken == "int8" else large)


def test_what_is_served_is_measured_on_the_same_samples_also_where_it_counts_classes_otherwise(bench: Bench) -> None:
    bench.serve(brightness_model(wrong=1.2), classes=("c0", "c1", "c2"))
    metric = bench.check(bench.offer(GOOD, name="two", classes=("c0", "c1", "c2"))).health[0].metric_before
    assert metric is not None
    assert 0.5 < metric < 0.9
    # The same served model under other names of its outputs is wrong about all that these names exchange.
    turned = bench.check(bench.offer(GOOD, name="two", classes=("c1", "c2", "c0"))).health[0].metric_before
    assert turned is not None
    assert turned < 0.5
    # Names that it does not know at all, or a model that is damaged: not compared.
    assert bench.check(bench.offer(GOOD, name="two", classes=("x", "y", "z"))).health[0].metric_before is None
    current = bench.slots.current()
    assert current is not None
    spoil(current.path)
    assert bench.check(bench.offer(GOOD, name="two")).health[0].metric_before is None


def test_a_worse_model_is_refused_and_leaves_everything_as_it_was(bench: Bench) -> None:
    bench.serve(GOOD)
    bench.serve(OTHER, name="two")
    answer = bench.check(bench.offer(BAD, name="three"))
    assert isinstance(answer, ModelNotTaken)
    assert (answer.refused, answer.kind, answer.health[0].metric_before) == (True, "accuracy", 1.0)
    assert is_model(bench.slots.current(), OTHER)
    assert is_model(bench.slots.previous(), GOOD)
    assert not (bench.slots.root / CHECK).exists()


def test_answers_that_are_no_numbers_are_refused(bench: Bench) -> None:
    answer = bench.check(bench.offer(brightness_model(wrong=float("nan"))))
    assert isinstance(answer, ModelNotTaken)
    assert (answer.kind, answer.reason) == ("accuracy", "its answers on 12 held out samples are not all numbers")


def test_a_score_of_minus_infinity_is_a_class_that_cannot_be(bench: Bench) -> None:
    """As it is to who predicts."""
    (health,) = bench.check(bench.offer(brightness_model(wrong=-float("inf")))).health
    assert health.metric is not None
    assert 0 < health.metric < 1


def test_of_a_large_holdout_some_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_CHECKED_SAMPLES", 6)
    (health,) = bench.check(bench.offer(GOOD)).health
    assert (health.holdout_samples, health.metric) == (6, 1.0)


def test_pictures_are_scaled_as_in_training_and_regression_has_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    targets = np.arange(60) % 3
    pictures = (targets[:, None, None, None] * 100 + rng.integers(0, 20, (60, 1, 6, 6))).astype(np.uint8)
    np.savez(tmp_path / "pictures.npz", inputs=pictures, targets=targets)
    (health,) = (
        Bench(tmp_path, "pictures.npz")
        .check(Bench(tmp_path, "pictures.npz").offer(brightness_model(scale=255 / 100)))
        .health
    )
    assert health.metric == 1.0
    inputs = rng.normal(size=(60, 1, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "numbers.npz", inputs=inputs, targets=2 * inputs.mean(axis=(1, 2, 3)))
    numbers = Bench(tmp_path, "numbers.npz")
    (health,) = numbers.check(numbers.offer(brightness_model(n_outputs=1, scale=2.0))).health
    assert health.metric == pytest.approx(0.0, abs=1e-9)
    (health,) = numbers.check(numbers.offer(brightness_model(n_outputs=1, scale=1.0))).health
    assert health.metric is not None
    assert health.metric > 0.001


@pytest.mark.parametrize(
    ("model", "change", "kind", "words"),
    [
        (b"\x08\x08 this is no model", {}, "bundle", "cannot be used"),
        (brightness_model(shape=(1, 5, 7)), {}, "data", "the model takes (1, 5, 7)"),
        (brightness_model(n_outputs=2), {}, "data", "class 2 is outside the model's 0 to 1"),
        (GOOD, {"size_bytes": len(GOOD) - 1}, "bundle", "does not have the"),
        (GOOD, {"size_bytes": len(GOOD) + 1}, "bundle", "does not have the"),
        (GOOD, {"not_compressed": True}, "bundle", "not a sound zstandard frame"),
        (GOOD, {"classes": ("a", "b")}, "bundle", "2 classes are named, and a sample's output has 3"),
    ],
)
def test_what_cannot_be_checked_is_told_in_one_line_and_what_serves_stays(
    bench: Bench, model: bytes, change: dict[str, Any], kind: str, words: str
) -> None:
    bench.serve(OTHER, name="before")
    offer = bench.offer(model, classes=change.pop("classes", ()))
    if change.pop("not_compressed", False):
        change["blob"] = bench.blobs.put(model)
    offer = msgspec.structs.replace(offer, files=(msgspec.structs.replace(offer.files[0], **change),))
    with pytest.raises(CheckError) as caught:
        bench.check(offer)
    assert (caught.value.kind, words in str(caught.value)) == (kind, True), str(caught.value)
    assert is_model(bench.slots.current(), OTHER)
    assert not (bench.slots.root / CHECK).exists()


def test_a_frame_that_swells_is_cut_off_where_the_deployment_says(bench: Bench) -> None:
    offer = bench.offer(GOOD)
    swelling = bench.blobs.put(compress(bytes(300 * 2**20)))
    assert swelling.size_bytes < 100_000
    written: list[int] = []
    offer = msgspec.structs.replace(offer, files=(msgspec.structs.replace(offer.files[0], blob=swelling),))

    def looked(folder: Path, **_: Any) -> None:
        written.extend(path.stat().st_size for path in Path(folder).iterdir())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(check.shutil, "rmtree", looked)
        with pytest.raises(CheckError, match="does not have the"):
            bench.check(offer)
    assert max(written) <= 2**21


def test_one_file_that_cannot_be_used_does_not_spoil_the_other(bench: Bench) -> None:
    answer = bench.serve(GOOD, b"\x08\x08 no model")
    assert [health.precision for health in answer.health] == ["float32"]


def test_no_room_for_two_models_is_told_and_loses_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.serve(GOOD)
    bench.serve(OTHER, name="two")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**24, 2**24))
    with pytest.raises(CheckError, match="no room for another model") as caught:
        bench.check(bench.offer(GOOD, name="three"))
    assert (caught.value.kind, caught.value.refused) == ("storage", False)
    assert (is_model(bench.slots.current(), OTHER), is_model(bench.slots.previous(), GOOD)) == (True, True)


def test_a_blob_that_the_disk_spoiled_is_removed_to_be_fetched_again(bench: Bench) -> None:
    offer = bench.offer(GOOD, OTHER)
    spoiled = offer.files[1].blob.sha256
    spoil(bench.blobs.path(spoiled))
    with pytest.raises(DamagedError, match="damaged on disk"):
        bench.check(offer)
    assert (bench.blobs.has(offer.files[0].blob.sha256), bench.blobs.has(spoiled)) == (True, False)


# With a real worker


class Line:
    """The worker's line of jobs, fed with what its processes say."""

    def __init__(self, bench: Bench) -> None:
        self.events: queue.SimpleQueue[WorkerSaid | WorkerEnded] = queue.SimpleQueue()
        self.supervisor = Supervisor(bench.configure, self.events)
        self.begun: list[int | None] = []
        self.jobs = Jobs(self.supervisor, starting=lambda _: self.begun.append(self.supervisor.worker))

    def run(self, deploy: Deploy, *, kill: bool = False) -> JobEnded:
        self.jobs.add(CheckModel(deploy=deploy))
        assert self.jobs.proceed(0.0) is None
        assert self.jobs.is_checking
        if kill:
            assert self.supervisor.worker is not None
            os.kill(self.supervisor.worker, signal.SIGKILL)
        while True:
            ended = self.jobs.handle(self.events.get(timeout=60), 0.0)
            if isinstance(ended, JobEnded):
                return ended


@pytest.fixture
def make_line() -> Iterator[Callable[[Bench], Line]]:
    made: list[Line] = []

    def make(bench: Bench) -> Line:
        made.append(Line(bench))
        return made[-1]

    yield make
    for line in made:
        line.supervisor.stop()


def test_every_check_has_a_worker_of_its_own_and_a_dead_one_costs_the_deployment(
    bench: Bench, make_line: Callable[[Bench], Line]
) -> None:
    line = make_line(bench)
    killed = check_event(line.run(bench.offer(GOOD), kill=True))
    assert isinstance(killed, CheckNotPassed)
    assert (killed.refused, killed.kind) == (False, "crashed")
    assert killed.reason == "during its check: the worker died of SIGKILL"
    passed = check_event(line.run(bench.offer(GOOD)))
    assert isinstance(passed, CheckPassed)
    assert passed.health[0].metric == 1.0
    assert (line.begun, line.supervisor.worker) == ([None, None], None)


def test_a_model_that_takes_more_memory_than_granted_is_refused_for_it(
    data_file: Path, make_line: Callable[[Bench], Line]
) -> None:
    bench = Bench(data_file.parent, memory_bytes=150 * 2**20)
    answer = check_event(make_line(bench).run(bench.offer(hungry_model(2**28))))
    assert isinstance(answer, CheckNotPassed)
    assert (answer.refused, answer.kind) == (True, "memory"), answer
    assert bench.slots.installed() is None
    fits = check_event(make_line(bench).run(bench.offer(GOOD)))
    assert isinstance(fits, CheckPassed)
    assert fits.health[0].peak_memory_bytes < 150 * 2**20


def test_a_check_that_does_not_end_is_ended(bench: Bench, make_line: Callable[[Bench], Line]) -> None:
    line = make_line(bench)
    line.jobs.add(CheckModel(deploy=bench.offer(brightness_model(rounds=10**9))))
    line.jobs.proceed(5.0)
    assert line.jobs.insist_at == 905.0
    ended = line.jobs.insist(905.0)
    assert ended is not None
    answer = check_event(ended)
    assert isinstance(answer, CheckNotPassed)
    assert (answer.kind, answer.reason) == ("crashed", "during its check: it had not ended after 900 s")
    assert (line.supervisor.worker, line.jobs.is_checking) == (None, False)
