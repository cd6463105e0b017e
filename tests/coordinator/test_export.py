"""Properties of exported files: they stand alone, score what they claim, and int8 is smaller and nearly as good."""

from __future__ import annotations

import hashlib
import json
import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import reft_edge
from reft_edge.agent import Predictor
from reft_edge.compile import SGD, compile_bundle
from reft_edge.coordinator.evaluation import evaluate
from reft_edge.coordinator.export import export_model
from reft_edge.coordinator.file_metadata import Origin
from reft_edge.data.dataset import Dataset
from reft_edge.errors import ModelError
from reft_edge.models.registry import build_model
from reft_edge.simulation.digits import load_digits_split


@pytest.fixture(scope="module")
def trained():
    """digits_cnn after a few epochs in torch, and its bundle."""
    digits = load_digits_split(1, alpha=1.0, seed=0)
    torch.manual_seed(0)
    module = build_model("digits_cnn", input_shape=(1, 8, 8), n_outputs=10)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    inputs, targets = torch.as_tensor(digits.private.inputs), torch.as_tensor(digits.private.targets)
    for step in range(40):
        batch = slice(step * 64 % 960, step * 64 % 960 + 64)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    bundle = compile_bundle(module, input_shape=(1, 8, 8), loss="cross_entropy", optimizer=SGD(momentum=0.9))
    return module, bundle, digits


def export(bundle, directory, **options):
    return export_model(
        name="global",
        manifest=bundle.manifest,
        inference_graph=bundle.inference_graph,
        weights=bundle.tensors(),
        directory=directory,
        **options,
    )


def test_both_files_stand_alone_and_score_what_they_claim(trained, tmp_path, caplog, monkeypatch):
    module, bundle, digits = trained
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.DEBUG):
        made = export(bundle, tmp_path / "out", calibration=digits.public.inputs, test=digits.test)
    assert not [record for record in caplog.records if "onnxruntime" in record.pathname]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["global.int8.onnx", "global.onnx", "out"]
    expected = evaluate(module, digits.test)
    assert made.float32.metrics.accuracy == expected.accuracy
    assert made.float32.metrics.loss == pytest.approx(expected.loss, rel=1e-4)
    assert made.int8.metrics.accuracy > expected.accuracy - 0.02
    assert made.int8.size_bytes < 0.4 * made.float32.size_bytes
    for file in (made.float32, made.int8):
        assert file.size_bytes == file.path.stat().st_size
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
        session = ort.InferenceSession(file.path, providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {"inputs": digits.test.inputs[:3]})
        assert outputs.shape == (3, 10)


def test_a_file_says_what_it_is_and_how_to_feed_it(trained, tmp_path):
    _, bundle, digits = trained
    as_bytes = {
        name: Dataset(inputs=(part.inputs * 255).astype(np.uint8), targets=part.targets)
        for name, part in (("public", digits.public), ("test", digits.test))
    }
    origin = Origin(federation="digits", run="run-1", classes=("null", "eins", "zwei", "drei", "süß"))
    made = export(bundle, tmp_path, calibration=as_bytes["public"].inputs, test=as_bytes["test"], origin=origin)
    for file in (made.float32, made.int8):
        session = ort.InferenceSession(file.path, providers=["CPUExecutionProvider"])
        meta = session.get_modelmeta()
        assert meta.producer_name == "reft-edge"
        entries = meta.custom_metadata_map
        assert (entries["federation"], entries["run"]) == ("digits", "run-1")
        assert json.loads(entries["classes"]) == list(origin.classes)
        assert json.loads(entries["input_shape"]) == [1, 8, 8]
        assert entries["Image.NominalPixelRange"] == "Normalized_0_1"
        assert entries["Image.BitmapPixelFormat"] == "Gray8"
        fed = as_bytes["test"].inputs.astype(np.float32) / 255
        (outputs,) = session.run(None, {"inputs": fed})
        accuracy = float((outputs.argmax(axis=1) == digits.test.targets).mean())
        assert float(entries["test_accuracy"]) == pytest.approx(accuracy, abs=1e-5)
    assert onnx.load(made.float32.path).producer_version == reft_edge.__version__


def test_a_device_understands_both_files_and_scores_what_they_claim(trained, tmp_path):
    _, bundle, digits = trained
    test = Dataset(inputs=(digits.test.inputs * 255).astype(np.uint8), targets=digits.test.targets)
    classes = tuple("zero one two three four five six seven eight nine".split())  # noqa: SIM905
    made = export(bundle, tmp_path, calibration=digits.public.inputs, test=test, origin=Origin(classes=classes))
    for file in (made.float32, made.int8):
        found = Predictor(file.path).predict(test.inputs)
        assert found.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert np.mean(found.indices == test.targets) == pytest.approx(file.metrics.accuracy, abs=1e-9)
        assert found.labels[0] == classes[found.indices[0]]


def test_a_file_claims_nothing_that_is_not_known(trained, tmp_path):
    _, bundle, _ = trained
    made = export(bundle, tmp_path)
    session = ort.InferenceSession(made.float32.path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map.keys() == {"model", "input_shape", "task"}


def test_the_same_weights_give_the_same_files(trained, tmp_path):
    _, bundle, digits = trained
    one, other = (export(bundle, tmp_path / name, calibration=digits.public.inputs) for name in "ab")
    assert one.float32.path.read_bytes() == other.float32.path.read_bytes()
    assert one.int8.path.read_bytes() == other.int8.path.read_bytes()
    assert one.float32.metrics is None


def test_without_public_inputs_there_is_float32_only_and_the_reason(trained, tmp_path):
    _, bundle, _ = trained
    made = export(bundle, tmp_path)
    assert made.int8 is None
    assert "public" in made.int8_problem


def test_test_data_that_do_not_fit_the_model_are_an_error_in_one_line(trained, tmp_path):
    _, bundle, _ = trained
    with pytest.raises(ModelError, match=r"global\.onnx"):
        export(bundle, tmp_path, test=Dataset(inputs=np.zeros((4, 3), np.float32), targets=np.zeros(4, np.int64)))
