"""Which blob a device fetches for its weights, and what the worker makes of it: every way in which one can be lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from reft_edge.agent import received_weights
from reft_edge.agent.admission import task_parts
from reft_edge.agent.received_weights import DeltaError, read_weights
from reft_edge.agent.spool import Spool
from reft_edge.bundle.bundle import Bundle
from reft_edge.errors import BundleError
from reft_edge.wire.codec_names import Float16, Float32, Int8
from reft_edge.wire.codecs import decode_tensors, encode_tensors
from reft_edge.wire.deltas import encode_delta, rebuild, values_digest
from reft_edge.wire.messages import Task, TrainingPlan, WeightsDelta, WeightsRef


@dataclass
class Scene:
    """A device that has the weights of round 1, and the task of round 2."""

    spool: Spool
    bundle: Bundle
    task: Task
    base: str
    whole: bytes
    delta: bytes

    def read(self) -> dict[str, np.ndarray]:
        return read_weights(self.task, self.bundle.manifest, blobs=self.spool.blobs, rebuilt=self.spool.rebuilt)

    def fetch(self, data: bytes) -> None:
        self.spool.blobs.put(data)

    @property
    def kept(self) -> list[str]:
        return sorted(path.name for path in self.spool.rebuilt.iterdir())

    def is_right(self, weights: dict[str, np.ndarray]) -> bool:
        assert self.task.delta is not None
        return values_digest(weights) == self.task.delta.values


@pytest.fixture
def scene(tmp_path: Path, bundle: Bundle) -> Scene:
    spool = Spool(tmp_path / "spool", max_blob_bytes=2**24)
    specs, codec = bundle.manifest.tensors, Float16()
    first = spool.blobs.put(encode_tensors(bundle.tensors(), codec))
    held = decode_tensors(spool.blobs.read(first), codec, specs)
    wanted = {name: array + np.asarray(0.01).astype(array.dtype) for name, array in bundle.tensors().items()}
    delta = encode_delta(wanted, held, Int8())
    weights = rebuild(held, delta, delta_codec=Int8(), weights_codec=codec, specs=specs)
    coordinator = Spool(tmp_path / "elsewhere", max_blob_bytes=2**24).blobs
    task = Task(
        task="t2",
        round=2,
        run="r",
        bundle=coordinator.put(bundle.manifest.to_json()),
        weights=WeightsRef(blob=coordinator.put(weights.blob), codec=codec),
        delta=WeightsDelta(
            blob=coordinator.put(delta), codec=Int8(), base=first.sha256, values=values_digest(weights.tensors)
        ),
        plan=TrainingPlan(local_epochs=1, batch_size=2, learning_rate=0.1, seed=0),
        deadline=0.0,
    )
    return Scene(spool, bundle, task, first.sha256, weights.blob, delta)


def test_what_is_fetched_follows_from_what_is_held(scene: Scene) -> None:
    manifest, task, delta = scene.bundle.manifest, scene.task, scene.task.delta
    assert delta is not None
    graphs = (manifest.training_graph, manifest.inference_graph)

    def parts(*held: str, whole: bool = False) -> tuple[object, ...]:
        return task_parts(manifest, task, has_weights=held.__contains__, whole=whole)

    weights = task.weights.blob
    assert parts() == (*graphs, weights)
    assert parts("another") == (*graphs, weights)
    assert parts(scene.base) == (*graphs, delta.blob)
    assert parts(scene.base, weights.sha256) == graphs
    assert parts(scene.base, weights.sha256, whole=True) == (*graphs, weights)
    plain = msgspec.structs.replace(task, delta=None)
    assert task_parts(manifest, plain, has_weights=lambda _: True) == (*graphs, weights)


def test_base_and_delta_give_the_weights_and_the_next_base(scene: Scene) -> None:
    scene.fetch(scene.delta)
    assert scene.spool.has_weights(scene.base)
    assert not scene.spool.has_weights(scene.task.weights.blob.sha256)
    first = scene.read()
    assert scene.is_right(first)
    assert scene.kept == [scene.task.weights.blob.sha256]
    assert scene.spool.has_weights(scene.task.weights.blob.sha256)
    # A training that is begun again needs neither any more.
    scene.spool.blobs.sweep(set())
    assert scene.is_right(scene.read())

    # What was put together is as good a base as what was fetched.
    specs = scene.bundle.manifest.tensors
    assert scene.task.delta is not None
    change = encode_delta(scene.bundle.tensors(), first, Int8())
    last = rebuild(dict(first), change, delta_codec=Int8(), weights_codec=Float16(), specs=specs)
    delta = msgspec.structs.replace(
        scene.task.delta,
        blob=scene.spool.blobs.put(change),
        base=scene.task.weights.blob.sha256,
        values=values_digest(last.tensors),
    )
    weights = WeightsRef(blob=Spool(scene.spool.root / "x", max_blob_bytes=2**24).blobs.put(last.blob), codec=Float16())
    scene.task = msgspec.structs.replace(scene.task, delta=delta, weights=weights)
    assert scene.is_right(scene.read())
    scene.spool.sweep(keep_blobs={weights.blob.sha256}, keep_residuals=frozenset())
    assert scene.kept == [weights.blob.sha256]


def test_whole_weights_are_taken_where_they_are(scene: Scene) -> None:
    scene.fetch(scene.whole)
    assert scene.is_right(scene.read())
    assert scene.kept == []


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def other_values(scene: Scene) -> None:
    assert scene.task.delta is not None
    scene.task = msgspec.structs.replace(scene.task, delta=msgspec.structs.replace(scene.task.delta, values="0" * 64))


def other_base(scene: Scene) -> None:
    tensors = {name: array + np.ones((), array.dtype) for name, array in scene.bundle.tensors().items()}
    scene.spool.blobs.path(scene.base).write_bytes(encode_tensors(tensors, Float16()))


def other_codec(scene: Scene) -> None:
    scene.spool.blobs.path(scene.base).write_bytes(encode_tensors(scene.bundle.tensors(), Float32()))


LOSSES: dict[str, Callable[[Scene], None]] = {
    "the base is gone": lambda scene: scene.spool.blobs.remove(scene.base),
    "the base is damaged": lambda scene: damage(scene.spool.blobs.path(scene.base)),
    "the base is another": other_base,
    "the base has another codec": other_codec,
    "the delta is gone": lambda scene: scene.spool.blobs.remove(delta_of(scene)),
    "the delta is damaged": lambda scene: damage(scene.spool.blobs.path(delta_of(scene))),
    "the coordinator has other values": other_values,
}


def delta_of(scene: Scene) -> str:
    assert scene.task.delta is not None
    return scene.task.delta.blob.sha256


@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_is_lost_or_damaged_asks_for_whole_weights_and_they_help(scene: Scene, loss: str) -> None:
    scene.fetch(scene.delta)
    LOSSES[loss](scene)
    with pytest.raises(DeltaError):
        scene.read()
    assert scene.kept == []
    scene.fetch(scene.whole)
    np.testing.assert_array_equal(
        scene.read()["4.weight"], decode_tensors(scene.whole, Float16(), scene.bundle.manifest.tensors)["4.weight"]
    )


def test_rebuilt_weights_that_are_damaged_are_made_again_or_fetched(scene: Scene) -> None:
    scene.fetch(scene.delta)
    scene.read()
    damage(scene.spool.rebuilt / scene.task.weights.blob.sha256)
    assert scene.is_right(scene.read())
    damage(scene.spool.rebuilt / scene.task.weights.blob.sha256)
    scene.spool.blobs.remove(delta_of(scene))
    with pytest.raises(DeltaError):
        scene.read()
    assert scene.kept == []


def test_weights_beyond_the_spools_limits_are_used_and_not_kept(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene.fetch(scene.delta)
    small = Spool(scene.spool.root, max_blob_bytes=1024).blobs
    monkeypatch.setattr(small, "_max_blob_bytes", 100)
    weights = read_weights(scene.task, scene.bundle.manifest, blobs=small, rebuilt=scene.spool.rebuilt)
    assert scene.is_right(weights)
    monkeypatch.setattr(received_weights, "RESERVED_FREE_BYTES", 2**62)
    assert scene.is_right(scene.read())
    assert scene.kept == []
    assert caplog.text.count("are not kept for the next round") == 2


def test_whole_weights_that_are_damaged_are_no_fault_of_a_delta(scene: Scene) -> None:
    scene.fetch(scene.whole)
    damage(scene.spool.blobs.path(scene.task.weights.blob.sha256))
    with pytest.raises(BundleError, match="damaged on disk"):
        scene.read()
