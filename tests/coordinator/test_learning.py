"""The steps of a round on blobs, as the conductor runs them."""

from __future__ import annotations

import numpy as np

from reft_edge.bundle.manifest import CrossEntropy
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.catalogue import CompiledVariant, Workshop, initial_model
from reft_edge.coordinator.contributions import Contribution
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.learning import Learner, LearningOptions
from reft_edge.coordinator.settings import ModelSettings
from reft_edge.data.dataset import Dataset
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Float32
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.messages import UpdateManifest, WeightsRef

SETTINGS = ModelSettings(name="digits_cnn", input_shape=(1, 8, 8), n_outputs=10)


def test_a_teacher_is_not_judged_by_the_batch_norm_statistics_of_its_device(tmp_path):
    """After a few steps they are mostly the initial ones, and such a teacher says the same for every input."""
    blobs = BlobStore(tmp_path)
    model = initial_model(SETTINGS, base_dir=tmp_path, seed=1)
    workshop = Workshop(model, SETTINGS, importance="magnitude", seed=1)
    bundle, channels = workshop.make(0.5)
    blobs.put(bundle.inference_graph)
    variant = CompiledVariant(
        name="0.5", ratio=0.5, manifest=bundle.manifest, manifest_blob=blobs.put(b"{}"), channels=channels
    )
    weights = WeightsRef(blob=blobs.put(encode_tensors(bundle.tensors(), Float32())), codec=Float32())
    inputs = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
    options = LearningOptions(
        loss=CrossEntropy(),
        aggregation=AggregationSettings(),
        distillation=DistillationSettings(epochs=2),
        seed=0,
        public=Dataset(inputs=inputs, targets=None),
    )

    def distilled(shift: float):
        delta = {
            name: np.full_like(values, shift if name.endswith("running_mean") else 0)
            for name, values in bundle.tensors().items()
        }
        update = UpdateManifest(blob=blobs.put(encode_tensors(delta, Float32())), codec=Float32(), training_samples=5)
        learner = Learner(initial_model(SETTINGS, base_dir=tmp_path, seed=1), blobs, options, workshop.module)
        contribution = Contribution(device="a", variant=variant, weights=weights, update=update)
        before = learner.save()
        outcome = learner.distil(before, [contribution], round_number=1)
        assert outcome.weights != before
        return learner.read(outcome.weights)

    plain, shifted = distilled(0.0), distilled(50.0)
    for name, values in plain.items():
        np.testing.assert_array_equal(values, shifted[name], err_msg=name)
