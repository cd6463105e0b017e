"""An emulated cohort does what real devices do: bytes, threads and codecs change nothing but what they should."""

from __future__ import annotations

import numpy as np
import pytest

from reft_edge.coordinator.catalogue import initial_model
from reft_edge.coordinator.contributions import read_update
from reft_edge.coordinator.holdings import graph_blobs
from reft_edge.coordinator.settings import ModelSettings, TrainingSettings
from reft_edge.simulation.cohort import Cohort, EmulatedDevice, Kit
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, load_digits_split

RATIOS = (0.0, 0.5, 0.5)
WEIGHT = "features.0.weight"


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    directory = tmp_path_factory.mktemp("blobs")
    architecture = ModelSettings(name="mlp", input_shape=INPUT_SHAPE, n_outputs=N_CLASSES)
    model = initial_model(architecture, base_dir=directory, seed=0)
    return Kit(model, architecture, RATIOS, seed=0, directory=directory)


def cohort_of(kit, training=None, *, n_parallel=1):
    parts = load_digits_split(len(RATIOS), alpha=1.0, seed=0).devices
    devices = [
        EmulatedDevice(name=f"device-{place}", ratio=ratio, data=part)
        for place, (ratio, part) in enumerate(zip(RATIOS, parts, strict=True))
    ]
    return Cohort(kit, devices, training or TrainingSettings(local_epochs=1), n_parallel=n_parallel)


def tensors_of(kit):
    return {name: tensor.numpy() for name, tensor in kit.fresh_model().state_dict().items()}


def moved(tensors):
    return {name: t + np.float32(0.01) if t.dtype == np.float32 else t for name, t in tensors.items()}


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def play_round(cohort, tensors, number):
    sent = cohort.publish(tensors)
    return sent, [cohort.send(one, number=number) for one in cohort.train(sent, number)]


def test_bytes_are_the_sizes_of_the_blobs_and_graphs_count_once(kit):
    cohort = cohort_of(kit, TrainingSettings(local_epochs=1, delta_codec="none"))
    up = dict.fromkeys((device.name for device in cohort.devices), 0)
    down = {d.name: sum(ref.size_bytes for ref in graph_blobs(kit.variants[d.ratio])) for d in cohort.devices}
    tensors = tensors_of(kit)
    for number in (1, 2):
        sent, contributions = play_round(cohort, tensors, number)
        for device, contribution in zip(cohort.devices, contributions, strict=True):
            down[device.name] += kit.blobs.path(sent[device.ratio].blob.sha256).stat().st_size
            up[device.name] += kit.blobs.path(contribution.update.blob.sha256).stat().st_size
        tensors = moved(tensors)
    for device in cohort.devices:
        assert device.traffic.down_bytes == down[device.name]
        assert device.traffic.up_bytes == up[device.name]


def test_a_delta_saves_bytes_from_the_second_round_on(kit):
    fetched = {}
    for delta_codec in ("none", "int8"):
        cohort = cohort_of(kit, TrainingSettings(local_epochs=1, weights_codec="float32", delta_codec=delta_codec))
        cohort.publish(tensors_of(kit))
        first = [device.traffic.down_bytes for device in cohort.devices]
        cohort.publish(moved(tensors_of(kit)))
        second = [device.traffic.down_bytes - before for device, before in zip(cohort.devices, first, strict=True)]
        fetched[delta_codec] = (first, second)
    assert fetched["none"][0] == fetched["int8"][0]
    assert all(delta < whole / 2 for delta, whole in zip(fetched["int8"][1], fetched["none"][1], strict=True))


def test_weights_that_have_not_changed_are_not_fetched_again(kit):
    cohort = cohort_of(kit, TrainingSettings(delta_codec="none"))
    cohort.publish(tensors_of(kit))
    before = [device.traffic for device in cohort.devices]
    cohort.publish(tensors_of(kit))
    assert [device.traffic for device in cohort.devices] == before


def test_devices_that_train_at_once_send_the_same_updates(kit):
    updates = []
    for n_parallel in (1, 3):
        cohort = cohort_of(kit, n_parallel=n_parallel)
        _, contributions = play_round(cohort, tensors_of(kit), 1)
        updates.append([one.update for one in contributions])
    assert updates[0] == updates[1]


def test_what_has_been_trained_passes_and_what_has_not_is_named(kit):
    cohort = cohort_of(kit)
    sent = cohort.publish(tensors_of(kit))
    learned = cohort.train(sent, 1)
    nothing = {name: np.zeros_like(change) for name, change in learned[1].delta.items()}
    contributions = [
        cohort.send(learned[0], number=1),
        cohort.send_as(learned[1], nothing, number=1),
        cohort.send(learned[2], number=1),
    ]
    good, rejected = cohort.screen(contributions)
    assert [one.device for one in good] == ["device-0", "device-2"]
    assert rejected == ("device-1",)


@pytest.mark.parametrize(
    ("compensation", "what_arrived"),
    [("error_feedback", lambda decoded: np.mean(decoded, axis=0)), ("ef21", lambda decoded: decoded[-1])],
)
def test_what_a_coarse_codec_leaves_out_arrives_in_later_rounds(kit, compensation, what_arrived):
    """The same update again and again: its mean, or the estimate of it, comes near."""
    cohort = cohort_of(kit, TrainingSettings(local_epochs=1, update_codec="int4", compensation=compensation))
    learned = cohort.train(cohort.publish(tensors_of(kit)), 1)[1]
    wanted = learned.delta[WEIGHT]
    decoded = []
    for number in range(1, 7):
        good, _ = cohort.screen([cohort.send(learned, number=number)])
        decoded.append(read_update(good[0], kit.blobs)[WEIGHT])
    assert relative_error(what_arrived(decoded), wanted) < relative_error(decoded[0], wanted) / 3
