"""Variants: the same for the same seed, made once, and found again after a restart."""

from __future__ import annotations

import numpy as np
import pytest

from reft_edge.coordinator.catalogue import Catalogue, Workshop, initial_model
from reft_edge.coordinator.contributions import Contribution, check_update, received_weights, trained_weights
from reft_edge.coordinator.publishing import blobs_of, publish_weights
from reft_edge.coordinator.records import AssignmentRecord, Prediction, RunRecord
from reft_edge.coordinator.settings import ModelSettings, SizeLimits
from reft_edge.coordinator.store import Store
from reft_edge.errors import BundleError, PlanError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Float16, Int8
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.messages import TrainingPlan, UpdateManifest

SETTINGS = ModelSettings(name="mlp", input_shape=(6,), n_outputs=3)
PLAN = TrainingPlan(local_epochs=1, batch_size=8, learning_rate=0.1, seed=3)


@pytest.fixture
def open_catalogue(tmp_path):
    """Open a catalogue as a new process would."""
    stores = []

    def open_catalogue(directory="a", *, workshop=None):
        store = Store(tmp_path / directory)
        stores.append(store)
        if store.latest_run("f") is None:
            store.create_run(RunRecord(run="run", federation="f", settings_digest="", created_at=0))
        model = initial_model(SETTINGS, base_dir=tmp_path, seed=1)
        blobs = BlobStore(tmp_path / directory / "blobs")
        workshop = workshop or Workshop(model, SETTINGS, importance="magnitude", seed=1)
        return Catalogue(workshop, run="run", store=store, blobs=blobs), blobs, model

    yield open_catalogue
    for store in stores:
        store.close()


class Idle:
    """A workshop that must not be needed."""


def test_variants_are_the_same_for_the_same_seed_and_survive_a_restart(open_catalogue, tmp_path):
    catalogue, blobs, _ = open_catalogue()
    made = catalogue.variant(0.5)
    assert catalogue.variant(0.5) is made
    assert open_catalogue("b")[0].variant(0.5).manifest == made.manifest, "byte for byte: blobs are named by content"
    assert all(blobs.has(sha256) for sha256 in catalogue.blobs)

    stored = Store(tmp_path / "c")
    stored.create_run(RunRecord(run="run", federation="f", settings_digest="", created_at=0))
    again = Catalogue(Idle(), run="run", store=_copy_variants(catalogue, stored), blobs=blobs).variant(0.5)
    assert (again.manifest, again.manifest_blob) == (made.manifest, made.manifest_blob)
    assert again.channels == made.channels
    stored.close()


@pytest.mark.parametrize("part", ["manifest", "channels", "training_graph", "inference_graph"])
def test_a_variant_that_our_own_disk_lost_is_made_again_byte_for_byte(open_catalogue, part):
    catalogue, blobs, _ = open_catalogue()
    made = catalogue.variant(0.5)
    (record,) = catalogue._store.variants("run")
    lost = getattr(record, part, None) or getattr(made.manifest, part)
    before = blobs.read(lost)
    blobs.path(lost.sha256).write_bytes(b"bits rot")
    catalogue.mend()
    again = catalogue.named("0.5")
    assert (again.manifest, again.manifest_blob, again.channels) == (made.manifest, made.manifest_blob, made.channels)
    assert blobs.read(lost) == before
    assert catalogue._store.variants("run") == [record]


def test_limits_hold_for_every_variant_and_ratios_prune_on_from_the_largest_within(tmp_path):
    model = initial_model(SETTINGS, base_dir=tmp_path, seed=1)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    limits = SizeLimits(parameters=n_parameters // 3)
    workshop = Workshop(model, SETTINGS, importance="magnitude", seed=1, limits=limits)
    ladder = workshop.ladder((0.0, 0.25, 0.5))
    largest, middle, smallest = (workshop.make(ratio)[0].manifest.cost.parameters for ratio in ladder)
    assert n_parameters // 3 >= largest > 0.9 * (n_parameters // 3)
    assert 0.5 < middle / largest < 0.65, "three quarters of the channels, about their square of the weights"
    assert 0.3 < smallest / middle < 0.7
    assert workshop.make(0.0)[0].manifest.cost.parameters == n_parameters, "the whole model is still there to export"
    with pytest.raises(PlanError, match="no variant fits 5 parameters"):
        Workshop(model, SETTINGS, importance="magnitude", seed=1, limits=SizeLimits(parameters=5)).ladder((0.0,))


def _copy_variants(catalogue, store):
    for record in catalogue._store.variants("run"):
        store.save_variant("run", record)
    return store


def test_what_is_published_is_the_variant_s_part_of_the_global_model(open_catalogue):
    catalogue, blobs, model = open_catalogue()
    variant = catalogue.variant(0.5)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    asked = [
        AssignmentRecord(task=f"t{d}", device=d, variant="0.5", ratio=0.5, prediction=Prediction(), plan=PLAN)
        for d in "ab"
    ]
    first, second = publish_weights(asked, {"0.5": variant}, tensors, codec=Float16(), blobs=blobs)
    assert first.weights == second.weights
    assert first.broadcast
    assert all(blobs.has(ref.sha256) for ref in blobs_of(first, variant))

    update = {name: np.full_like(values, 1) for name, values in variant.channels.gather(tensors).items()}
    contribution = contribution_of(variant, first, update, blobs)
    check_update(contribution, blobs, max_steps=1)
    received = received_weights(contribution, blobs)
    for name, values in variant.channels.gather(tensors).items():
        np.testing.assert_allclose(received[name], values, atol=1e-3)
    for name, values in trained_weights(contribution, blobs).items():
        np.testing.assert_allclose(values, received[name] + 1, rtol=1e-5, atol=0.01)

    with pytest.raises(BundleError, match="norm"):
        check_update(
            contribution_of(variant, first, {n: v * 1000 for n, v in update.items()}, blobs), blobs, max_steps=1
        )
    del update[next(iter(update))]
    with pytest.raises(BundleError):
        check_update(contribution_of(variant, first, update, blobs), blobs, max_steps=1)


def contribution_of(variant, assignment, update, blobs):
    manifest = UpdateManifest(blob=blobs.put(encode_tensors(update, Int8())), codec=Int8(), training_samples=5)
    return Contribution(device="a", variant=variant, weights=assignment.weights, update=manifest)
