"""What goes down: the same bytes however often a round is published, and only what somebody needs at the broker."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from reft_edge.coordinator.catalogue import CompiledVariant, Workshop, initial_model
from reft_edge.coordinator.holdings import Held, download, what_is_held
from reft_edge.coordinator.publishing import Chain, blobs_of, broadcast_blobs, make_task, publish_weights
from reft_edge.coordinator.records import AssignmentRecord, Prediction, RoundKey
from reft_edge.coordinator.settings import ModelSettings
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Float16, Float32, Int8
from reft_edge.wire.codecs import decode_tensors
from reft_edge.wire.messages import TrainingPlan

SETTINGS = ModelSettings(name="mlp", input_shape=(6,), n_outputs=3)
PLAN = TrainingPlan(local_epochs=1, batch_size=8, learning_rate=0.1, seed=3)
HALF = Float16()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return initial_model(SETTINGS, base_dir=tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def made(model):
    workshop = Workshop(model, SETTINGS, importance="magnitude", seed=1)
    return {ratio: workshop.make(ratio) for ratio in (0.0, 0.5)}


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def variants(made, blobs):
    found = {}
    for ratio, (bundle, channels) in made.items():
        for graph in (bundle.training_graph, bundle.inference_graph):
            blobs.put(graph)
        found[f"{ratio:g}"] = CompiledVariant(
            name=f"{ratio:g}",
            ratio=ratio,
            manifest=bundle.manifest,
            manifest_blob=blobs.put(bundle.manifest.to_json()),
            channels=channels,
        )
    return found


@pytest.fixture
def tensors(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def moved(tensors, *, seed):
    rng = np.random.default_rng(seed)
    return {
        name: values + (0.01 * rng.standard_normal(values.shape)).astype(values.dtype)
        for name, values in tensors.items()
    }


def asked(names, ratio=0.0, number=1):
    key = RoundKey(run="run", number=number)
    return [
        AssignmentRecord(
            task=key.task(name), device=name, variant=f"{ratio:g}", ratio=ratio, prediction=Prediction(), plan=PLAN
        )
        for name in names
    ]


def answered(assignments):
    return [msgspec.structs.replace(assignment, update="u") for assignment in assignments]


def chain_of(assignments, held=None):
    return Chain(
        codec=Int8(),
        bases={assignment.variant: assignment.weights for assignment in assignments},
        held=what_is_held(answered(assignments)) if held is None else held,
    )


@pytest.fixture
def publish(variants, blobs):
    def publish(assignments, tensors, chain=None, codec=HALF):
        return publish_weights(assignments, variants, tensors, codec=codec, blobs=blobs, chain=chain)

    return publish


def test_published_again_a_round_has_the_same_blobs_and_a_second_attempt_the_same_weights(publish, tensors):
    first = publish(asked("abc"), tensors)
    assert all(assignment.delta is None for assignment in first)
    wanted = moved(tensors, seed=2)
    second = publish(asked("abc", number=2), wanted, chain_of(first))
    assert publish(asked("abc", number=2), wanted, chain_of(first)) == second
    # The attempt found no quorum; who trained in it already has what the next attempt asks for.
    again = publish(asked("abcd", number=2), wanted, chain_of(first, what_is_held(answered(second[:2]))))
    assert {assignment.weights.blob for assignment in again} == {second[0].weights.blob}
    assert {assignment.delta.blob for assignment in again} == {second[0].delta.blob}


def test_whole_weights_hold_what_base_and_delta_give(publish, tensors, variants, blobs):
    (first,) = publish(asked("a"), tensors)
    wanted = moved(tensors, seed=2)
    (second,) = publish(asked("a", number=2), wanted, chain_of([first]))
    (alone,) = publish(asked("a", number=2), wanted)
    specs = variants["0"].manifest.tensors
    followed, exact = (
        decode_tensors(blobs.read(ref.blob), ref.codec, specs) for ref in (second.weights, alone.weights)
    )
    for name in exact:
        np.testing.assert_allclose(followed[name], exact[name], atol=3e-3)
    assert second.delta.base == first.weights.blob.sha256
    assert second.delta.blob.size_bytes < 0.7 * second.weights.blob.size_bytes
    task = make_task(second, RoundKey(run="run", number=2), deadline=1.0, classes=(), sequence=1)
    assert (task.weights, task.delta) == (second.weights, second.delta)


def test_each_blob_lies_at_the_broker_if_several_devices_should_need_it(publish, tensors, variants):
    graphs = {ref.sha256 for ref in blobs_of(asked("a")[0], variants["0"])}

    def at_broker(assignments):
        ways = (assignments[0].weights.blob, assignments[0].delta.blob if assignments[0].delta else None)
        found = {ref.sha256 for ref in broadcast_blobs(assignments, variants)}
        assert found - {way.sha256 for way in ways if way} in (graphs, set())
        return [way is not None and way.sha256 in found for way in ways]

    first = publish(asked("abcd"), tensors)
    assert at_broker(first) == [True, False]
    wanted = moved(tensors, seed=2)

    def second(devices, held):
        chain = chain_of(first, {name: Held(0.0, first[0].weights.blob.sha256) for name in held})
        return at_broker(publish(asked(devices, number=2), wanted, chain))

    assert second("abcd", "abcd") == [False, True]
    assert second("abcd", "abc") == [False, True]
    assert second("abcd", "ab") == [True, True]
    assert second("abcd", "a") == [True, False]
    assert second("abcd", "") == [True, False]
    assert second("ab", "a") == [False, False]
    assert second("a", "a") == [False, False]  # a single device asks the coordinator for everything


def test_what_a_device_fetches_follows_from_what_it_holds(publish, tensors, variants):
    first = publish(asked("a"), tensors)
    (second,) = publish(asked("a", number=2), moved(tensors, seed=2), chain_of(first))
    variant = variants["0"]
    whole, delta, graphs = second.weights.blob, second.delta.blob, blobs_of(asked("a")[0], variant)
    base = first[0].weights.blob.sha256
    assert download(second, variant, None) == [*graphs, whole]
    assert download(second, variant, Held(0.0, base)) == [delta]
    assert download(second, variant, Held(0.0, "of an earlier round")) == [whole]
    assert download(second, variant, Held(0.5, "of another variant")) == [*graphs, whole]
    assert download(second, variant, Held(0.0, whole.sha256)) == []


def test_who_answered_holds_the_weights_of_its_last_task(publish, tensors):
    one = publish(asked("abc"), tensors)
    two = publish(asked("ab", 0.5, number=2), tensors)
    history = [*answered(one), *answered(two[:1]), two[1], *asked("abc", number=3)]
    assert what_is_held(history) == {
        "a": Held(0.5, two[0].weights.blob.sha256),
        "b": Held(0.0, one[1].weights.blob.sha256),
        "c": Held(0.0, one[2].weights.blob.sha256),
    }


def test_a_variant_that_is_new_or_whose_base_is_lost_travels_whole(publish, tensors, blobs):
    first = publish(asked("ab"), tensors)
    wanted = moved(tensors, seed=2)
    assert publish(asked("ab", 0.5, number=2), wanted, chain_of(first))[0].delta is None
    assert publish(asked("ab", number=2), wanted, chain_of(first), codec=Float32())[0].delta is None
    blobs.remove(first[0].weights.blob.sha256)
    (lost, _), (plain, _) = (publish(asked("ab", number=2), wanted, chain) for chain in (chain_of(first), None))
    assert lost.delta is None
    assert lost.weights == plain.weights


def test_a_delta_that_saves_nothing_is_none(publish, tensors):
    first = publish(asked("a"), tensors, codec=Int8())
    chain = Chain(codec=Float32(), bases={"0": first[0].weights}, held={})
    assert publish(asked("a", number=2), moved(tensors, seed=2), chain, codec=Int8())[0].delta is None
