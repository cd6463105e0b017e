"""What an update may be: every way in which it can be useless has its own reason, and honest ones pass."""

from __future__ import annotations

import numpy as np
import pytest

from reft_edge.bundle.container import pack_tensors
from reft_edge.bundle.manifest import CrossEntropy
from reft_edge.coordinator.catalogue import CompiledVariant, Workshop, initial_model
from reft_edge.coordinator.contributions import Contribution, check_update, unwanted_reason, update_length
from reft_edge.coordinator.settings import ModelSettings
from reft_edge.errors import BundleError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import (
    Float16,
    Float32,
    Int4,
    Int8,
    LayerWise,
    RandomK,
    Selective,
    TopK,
    codec_text,
)
from reft_edge.wire.codecs import encode_tensors, weight_norms
from reft_edge.wire.messages import UpdateManifest, WeightsRef

SETTINGS = ModelSettings(name="digits_cnn", input_shape=(1, 8, 8), n_outputs=10)
STEPS = 6
EXACT = Float32()
COARSE = (Int4(), TopK(fraction=0.01), RandomK(unbiased=True), LayerWise(error_budget=0.9), Selective(threshold=1.0))
CODECS = (EXACT, Float16(), Int8(), Int8(stochastic=True), *COARSE)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return BlobStore(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def variants(blobs, tmp_path_factory):
    """The whole model with batch norm and half of it, with their weights."""
    model = initial_model(SETTINGS, base_dir=tmp_path_factory.mktemp("model"), seed=1)
    workshop = Workshop(model, SETTINGS, importance="magnitude", seed=1)
    found = {}
    for ratio in (0.0, 0.5):
        bundle, channels = workshop.make(ratio)
        variant = CompiledVariant(
            name=str(ratio), ratio=ratio, manifest=bundle.manifest, manifest_blob=blobs.put(b"{}"), channels=channels
        )
        found[ratio] = variant, bundle.tensors()
    return found


def honest(tensors, *, size=1e-3):
    """An update as training makes it: small steps, moving statistics, counters that count."""
    rng = np.random.default_rng(0)
    delta = {}
    for name, values in tensors.items():
        if values.dtype.kind == "i":
            delta[name] = np.full_like(values, STEPS)
        elif name.endswith("running_var"):
            delta[name] = values * np.float32(-0.4)
        else:
            delta[name] = (size * rng.standard_normal(values.shape)).astype(values.dtype)
    return delta


def contribution(blobs, variant, tensors, delta, codec=EXACT):
    if isinstance(delta, dict):
        data = encode_tensors(delta, codec, rng=np.random.default_rng(0), norms=weight_norms(tensors))
    else:
        data = delta
    return Contribution(
        device="a",
        variant=variant,
        weights=WeightsRef(blob=blobs.put(encode_tensors(tensors, Float32())), codec=Float32()),
        update=UpdateManifest(blob=blobs.put(data), codec=codec, training_samples=5),
    )


@pytest.mark.parametrize("codec", CODECS, ids=codec_text)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_an_honest_update_passes_under_every_codec(blobs, variants, ratio, codec):
    variant, tensors = variants[ratio]
    check_update(contribution(blobs, variant, tensors, honest(tensors), codec), blobs, max_steps=STEPS)


@pytest.mark.parametrize("codec", COARSE, ids=codec_text)
def test_most_of_an_update_may_stay_at_home_but_not_all_of_it(blobs, variants, codec):
    variant, tensors = variants[0.0]
    nothing = {name: np.zeros_like(values) for name, values in tensors.items()}
    little = {name: values.copy() for name, values in nothing.items()}
    little[named(tensors, "weight")][0] = 1e-3
    check_update(contribution(blobs, variant, tensors, little, codec), blobs, max_steps=STEPS)
    with pytest.raises(BundleError, match="has not trained"):
        check_update(contribution(blobs, variant, tensors, nothing, codec), blobs, max_steps=STEPS)


def named(tensors, suffix):
    return next(name for name in tensors if name.endswith(suffix))


def changed(delta, suffix, value):
    """One entry of the tensor whose name ends so is set to `value`."""
    values = delta[named(delta, suffix)]
    values[(0,) * values.ndim] = value


BROKEN = {
    "zeros": (lambda delta: [values.fill(0) for values in delta.values()], "changes no parameter"),
    "a negative variance": (lambda delta: changed(delta, "running_var", -1.001), "variance .* cannot be negative"),
    "a huge mean": (lambda delta: changed(delta, "running_mean", 3e30), "to 3e\\+30; training has diverged"),
    "a huge negative mean": (lambda delta: changed(delta, "running_mean", -3e38), "training has diverged"),
    "a counter that runs back": (lambda delta: changed(delta, "num_batches_tracked", -1), "counter .* by -1 to -1"),
    "a counter that runs ahead": (
        lambda delta: changed(delta, "num_batches_tracked", STEPS + 1),
        f"by {STEPS + 1} to {STEPS + 1}; the task has {STEPS} steps",
    ),
    "a counter that overflows": (lambda delta: changed(delta, "num_batches_tracked", 2**63 - 1), "counter"),
    "a huge weight": (lambda delta: changed(delta, "weight", 1e30), "norm 1e\\+30 is above"),
    "a missing tensor": (lambda delta: delta.pop(named(delta, "weight")), "lack"),
    "a strange tensor": (lambda delta: delta.update(extra=np.zeros(1, np.float32)), "unknown 'extra'"),
    "a wrong shape": (lambda delta: delta.update({named(delta, "bias"): np.zeros(99, np.float32)}), "expected"),
    "a wrong dtype": (lambda delta: delta.update({named(delta, "bias"): np.zeros(10, np.float64)}), "expected|dtype"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_kind_of_useless_update_has_its_reason(blobs, variants, name):
    breaks, reason = BROKEN[name]
    variant, tensors = variants[0.0]
    delta = honest(tensors)
    breaks(delta)
    with pytest.raises(BundleError, match=reason):
        check_update(contribution(blobs, variant, tensors, delta), blobs, max_steps=STEPS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", ["weight", "running_var"])
def test_values_that_are_not_finite_are_found_whoever_encoded_them(blobs, variants, value, suffix):
    variant, tensors = variants[0.0]
    delta = honest(tensors)
    changed(delta, suffix, value)
    with pytest.raises(BundleError, match="not finite"):
        check_update(
            contribution(blobs, variant, tensors, pack_tensors(delta, {"codec": "float32"})), blobs, max_steps=STEPS
        )


def test_bytes_that_are_no_container_are_no_update(blobs, variants):
    variant, tensors = variants[0.0]
    for data in (b"", b"garbage" * 9, encode_tensors(honest(tensors), Float32())[:-9]):
        with pytest.raises(BundleError):
            check_update(contribution(blobs, variant, tensors, data), blobs, max_steps=STEPS)


def test_lengths_compare_between_variants(blobs, variants):
    """Root mean squares of the same kind of change are alike, however many parameters there are."""
    lengths = [
        update_length(contribution(blobs, variant, tensors, honest(tensors, size=2e-3)), blobs).root_mean_square
        for variant, tensors in variants.values()
    ]
    assert lengths == pytest.approx([2e-3, 2e-3], rel=0.05)


@pytest.mark.parametrize(
    ("metrics", "possible"),
    [
        ({}, True),
        ({"loss_first": 2.3, "loss_last": 0.0, "holdout_metric_before": 0.0, "holdout_metric_after": 1.0}, True),
        ({"loss_last": -0.1}, False),
        ({"loss_first": 1e300}, False),
        ({"holdout_metric_after": 1.01}, False),
        ({"holdout_metric_before": -1.0}, False),
    ],
)
def test_metrics_that_cannot_be_are_a_reason_not_to_pull(variants, metrics, possible):
    manifest = variants[0.0][0].manifest
    assert isinstance(manifest.loss, CrossEntropy)
    update = UpdateManifest(blob=manifest.weights, codec=Int8(), training_samples=5, **metrics)
    assert (unwanted_reason(update, manifest, Int8()) == "") is possible
