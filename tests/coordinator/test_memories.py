"""What is remembered of devices: within a limit, for the same variant and method only, and never invented."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from reft_edge.bundle.container import unpack_tensors
from reft_edge.bundle.manifest import BlobRef
from reft_edge.compile import compile_bundle
from reft_edge.compile.channels import ChannelMap
from reft_edge.coordinator.catalogue import CompiledVariant
from reft_edge.coordinator.contributions import Contribution, check_update, read_update, unwanted_reason
from reft_edge.coordinator.memories import recall, remember, within_limit
from reft_edge.coordinator.records import AssignmentRecord, MergedMemory, Prediction, Remembered
from reft_edge.errors import BundleError
from reft_edge.models.registry import build_model
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Float32, Int8, TopK
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.compensation.methods import update_encoder
from reft_edge.wire.compensation_names import EControlOptions, EF21Options, ErrorFeedbackOptions
from reft_edge.wire.messages import TrainingPlan, UpdateManifest, WeightsRef

PLAN = TrainingPlan(local_epochs=1, batch_size=8, learning_rate=0.1, seed=3, compensation=EF21Options())
CODEC = TopK(fraction=0.2)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


@pytest.fixture(scope="module")
def bundle():
    return compile_bundle(build_model("mlp", input_shape=(6,), n_outputs=3), input_shape=(6,))


@pytest.fixture
def variant(bundle, blobs):
    channels = ChannelMap.identity(bundle.tensors())
    manifest_blob = blobs.put(bundle.manifest.to_json())
    return CompiledVariant(
        name="0", ratio=0.0, manifest=bundle.manifest, manifest_blob=manifest_blob, channels=channels
    )


def memory_of(device, number, size_bytes=10):
    return MergedMemory(
        device=device,
        round=number,
        variant="0",
        method=EF21Options(),
        remembered=Remembered(update=f"{number:064x}", tensors=BlobRef(sha256=f"{number:064x}", size_bytes=size_bytes)),
    )


def test_who_was_merged_longest_ago_is_forgotten_first():
    memories = [memory_of("a", 3), memory_of("b", 1), memory_of("c", 3), memory_of("d", 2)]
    assert list(within_limit(memories, max_bytes=30)) == ["a", "c", "d"]
    assert list(within_limit(reversed(memories), max_bytes=39)) == ["a", "c", "d"]
    assert within_limit(memories, max_bytes=9) == {}
    assert len(within_limit(memories)) == 4


def test_a_task_names_what_is_remembered_of_the_same_variant_and_method_and_still_here(blobs):
    def asked(device, variant="0", **plan):
        return AssignmentRecord(
            task=device,
            device=device,
            variant=variant,
            ratio=0.0,
            prediction=Prediction(),
            plan=msgspec.structs.replace(PLAN, **plan),
        )

    here = blobs.put(b"memory")
    remembered = Remembered(update="a" * 64, tensors=here)
    memories = {name: msgspec.structs.replace(memory_of(name, 1), remembered=remembered) for name in "abcde"}
    memories["d"] = memory_of("d", 1)  # its blob has been lost
    found = recall(
        [
            asked("a"),
            asked("b", "0.5"),
            asked("c", compensation=EControlOptions()),
            asked("d"),
            asked("e", compensation=ErrorFeedbackOptions()),
            asked("f"),
        ],
        memories,
        blobs,
    )
    assert [assignment.memory for assignment in found] == [remembered, None, None, None, None, None]


def trained(bundle, seed):
    rng = np.random.default_rng(seed)
    return {
        name: (0.01 * rng.standard_normal(values.shape)).astype(values.dtype)
        for name, values in bundle.tensors().items()
    }


@pytest.mark.parametrize("method", [EF21Options(), EControlOptions()])
def test_an_update_is_read_and_remembered_from_what_it_goes_on_from(bundle, variant, blobs, method):
    weights = WeightsRef(blob=blobs.put(encode_tensors(bundle.tensors(), Float32())))
    encoder = update_encoder(method, CODEC)
    memory = None
    for number in (1, 2, 3):
        data = encoder.encode(trained(bundle, 0))
        sent = Contribution(
            device="a",
            variant=variant,
            weights=weights,
            update=UpdateManifest(blob=blobs.put(data), codec=CODEC, training_samples=5),
            compensation=method,
            memory=memory,
        )
        check_update(sent, blobs, max_steps=10)
        update = read_update(sent, blobs)
        stored = remember([sent], blobs)
        assert stored == remember([sent], blobs), "the same again after a kill"
        memory = stored["a"]
        tensors, _ = unpack_tensors(blobs.read(memory), max_bytes=2**24)
        prefix = "" if isinstance(method, EF21Options) else "estimate::"
        for name, values in tensors.items():
            np.testing.assert_array_equal(values, encoder.state[prefix + name], err_msg=f"{name} in round {number}")
            np.testing.assert_array_equal(values, update[name])
    blobs.remove(memory.sha256)
    with pytest.raises(BundleError):
        read_update(replace(sent, memory=memory), blobs)


def test_nothing_is_remembered_of_methods_that_need_no_memory(bundle, variant, blobs):
    sent = Contribution(
        device="a",
        variant=variant,
        weights=WeightsRef(blob=blobs.put(encode_tensors(bundle.tensors(), Float32()))),
        update=UpdateManifest(
            blob=blobs.put(encode_tensors(trained(bundle, 0), Int8())), codec=Int8(), training_samples=5
        ),
    )
    assert remember([sent], blobs) == {}


def test_an_update_that_goes_on_from_another_than_the_task_names_is_not_wanted(bundle):
    def reason(announced, named):
        update = UpdateManifest(
            blob=BlobRef(sha256="0" * 64, size_bytes=9), codec=CODEC, training_samples=5, memory=announced
        )
        return unwanted_reason(update, bundle.manifest, CODEC, memory=named)

    assert reason(None, None) == reason(None, "a" * 64) == reason("a" * 64, "a" * 64) == ""
    assert "goes on from another" in reason("b" * 64, "a" * 64)
    assert "goes on from another" in reason("b" * 64, None)
