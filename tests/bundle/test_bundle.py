from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reft_edge.bundle.bundle import MANIFEST_FILE, TRAINING_FILE, WEIGHTS_FILE, Bundle, blob_ref
from reft_edge.bundle.container import compress, pack_tensors
from reft_edge.bundle.inference import Predictor
from reft_edge.bundle.manifest import SGD, Cost, CrossEntropy, Manifest, TensorSpec
from reft_edge.errors import BundleError, DataError

onnx = pytest.importorskip("onnx")


def tiny_bundle() -> Bundle:
    """y = x @ w, by hand: the bundle layer needs no compiler."""
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["inputs", "w"], ["outputs"])],
        "tiny",
        [helper.make_tensor_value_info("inputs", real, ["n", 2]), helper.make_tensor_value_info("w", real, [2, 3])],
        [helper.make_tensor_value_info("outputs", real, ["n", 3])],
    )

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    blob = compress(model.SerializeToString())
    weights = pack_tensors({"w": np.arange(6, dtype=np.float32).reshape(2, 3)})
    manifest = Manifest(
        model="tiny",
        input=TensorSpec(name="inputs", shape=(2,)),
        target=TensorSpec(name="targets", shape=(), dtype="int64"),
        output=TensorSpec(name="outputs", shape=(3,)),
        loss=CrossEntropy(),
        optimizer=SGD(),
        parameters=(TensorSpec(name="w", shape=(2, 3)),),
        buffers=(),
        cost=Cost(
            parameters=6, forward_macs=6, step_flops_per_sample=36, memory_fixed_bytes=48, memory_per_sample_bytes=20
        ),
        training_graph=blob_ref(blob),
        inference_graph=blob_ref(blob),
        weights=blob_ref(weights),
    )
    return Bundle(manifest=manifest, training_graph=blob, inference_graph=blob, weights=weights)


def test_a_bundle_survives_its_directory(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    assert Bundle.open(bundle.save(tmp_path / "deep" / "er")) == bundle


@pytest.mark.parametrize("file", [TRAINING_FILE, WEIGHTS_FILE])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, file: str) -> None:
    path = tiny_bundle().save(tmp_path) / file
    data = path.read_bytes()
    for damaged in (data[:-1] + b"?", data[:-1], data + b"?"):
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=file):
            Bundle.open(tmp_path)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    (tiny_bundle().save(tmp_path) / MANIFEST_FILE).write_text("{}")
    with pytest.raises(BundleError, match="manifest is not valid"):
        Bundle.open(tmp_path)


def test_new_weights_change_the_weights_only() -> None:
    bundle = tiny_bundle()
    other = bundle.with_weights({"w": np.ones((2, 3), np.float32)})
    assert other.training_graph == bundle.training_graph
    assert other.manifest.weights == blob_ref(other.weights)
    assert np.array_equal(other.tensors()["w"], np.ones((2, 3)))
    with pytest.raises(BundleError, match="'w' is float64"):
        bundle.with_weights({"w": np.ones((2, 3))})


def test_prediction_in_batches_is_the_whole_and_bad_input_is_told() -> None:
    bundle = tiny_bundle()
    predictor, weights = Predictor(bundle.inference_graph), bundle.tensors()
    inputs = np.random.default_rng(0).standard_normal((7, 2), np.float32)
    np.testing.assert_allclose(predictor.predict(weights, inputs, batch_size=3), inputs @ weights["w"], rtol=1e-5)
    with pytest.raises(DataError, match="does not take inputs"):
        predictor.predict(weights, inputs[:, :1])
    with pytest.raises(DataError, match="no samples"):
        predictor.predict(weights, inputs[:0])
    with pytest.raises(BundleError, match="lack 'w'"):
        predictor.predict({}, inputs)


def test_a_graph_that_onnxruntime_refuses_is_a_bundle_error() -> None:

    with pytest.raises(BundleError, match="refuses the graph"):
        Predictor(compress(b"no graph"))
