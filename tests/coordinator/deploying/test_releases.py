"""What a version is made of, and what is said about files that are not what they should be."""

from __future__ import annotations

import hashlib
import logging
from contextlib import closing

import msgspec
import pytest

from reft_edge.bundle.container import decompress
from reft_edge.coordinator.deploying.releases import choose_run, release_file, release_run
from reft_edge.coordinator.records import RunRecord
from reft_edge.coordinator.settings import ModelSettings
from reft_edge.coordinator.store import Store
from reft_edge.errors import ConfigError, FederationError, ModelError
from reft_edge.wire.blobs import BlobStore
from tests.coordinator.deploying.versions import finish_run, model_bytes

MODEL = ModelSettings(name="mlp", input_shape=(6,), n_outputs=3)
BIRDS = ModelSettings(name="mlp", input_shape=(6,), classes=("robin", "wren", "jay"))


@pytest.fixture
def results(tmp_path):
    finish_run(tmp_path, "birds", "20260301-aa", seed=1, at=1.0)
    return tmp_path


@pytest.fixture
def store(results):
    with closing(Store(results)) as opened:
        yield opened


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def test_a_runs_models_are_its_exports_the_largest_first_in_both_precisions(store, blobs, results):
    release = release_run(store, blobs, "20260301-aa", MODEL)
    assert [model.name for model in release.models] == ["global", "small"]
    assert (release.version, release.input_shape) == ("20260301-aa", (6,))
    for model in release.models:
        assert [file.precision for file in model.files] == ["float32", "int8"]
        for file, sha256, suffix in zip(model.files, model.sha256s, ("", ".int8"), strict=True):
            content = decompress(blobs.read(file.blob), max_bytes=2**20)
            assert content == (results / f"20260301-aa/models/{model.name}{suffix}.onnx").read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (sha256, file.size_bytes)
    assert [file.test_metric for file in release.models[1].files] == [0.8, 0.8]


def test_the_latest_finished_run_is_the_version(store):
    store.create_run(RunRecord(run="20260401-cc", federation="birds", settings_digest="", created_at=9.0))
    assert choose_run(store, "birds", None).run == "20260301-aa"
    with pytest.raises(FederationError, match="run 20260401-cc is active"):
        choose_run(store, "birds", "20260401-cc")
    with pytest.raises(ConfigError, match="no version '20260301-ab'; did you mean '20260301-aa'"):
        choose_run(store, "birds", "20260301-ab")
    with pytest.raises(FederationError, match=r"no finished run to deploy \(nothing was ever run\).*--file"):
        choose_run(store, "fish", None)


def test_files_that_are_gone_or_were_changed_are_named(store, blobs, results):
    path = results / "20260301-aa/models/small.int8.onnx"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with pytest.raises(ModelError, match=r"small.int8.onnx was changed after run 20260301-aa"):
        release_run(store, blobs, "20260301-aa", MODEL)
    path.unlink()
    with pytest.raises(ModelError, match=r"small.int8.onnx cannot be read: No such file"):
        release_run(store, blobs, "20260301-aa", MODEL)
    other = model_bytes(1, run="20260301-bb", input_shape="[6]")
    assert len(other) == len(content)
    path.write_bytes(other)
    with pytest.raises(ModelError, match="is a file of run 20260301-bb"):
        release_run(store, blobs, "20260301-aa", MODEL)


def test_a_file_that_was_changed_and_kept_its_size_is_noticed_where_its_hash_is_known(store, blobs, results):
    path = results / "20260301-aa/models/global.onnx"
    (record,) = [one for one in store.exports("20260301-aa") if one.name == "global"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    store.save_export("20260301-aa", msgspec.structs.replace(record, sha256=digest))
    assert len(release_run(store, blobs, "20260301-aa", MODEL).models) == 2
    other = model_bytes(99, run="20260301-aa", input_shape="[6]")
    assert len(other) == record.values["size_bytes"]
    path.write_bytes(other)
    with pytest.raises(ModelError, match=r"global.onnx was changed after run 20260301-aa"):
        release_run(store, blobs, "20260301-aa", MODEL)
    store.save_export("20260301-aa", msgspec.structs.replace(record, sha256=""))  # as older runs are stored
    assert len(release_run(store, blobs, "20260301-aa", MODEL).models) == 2


def test_a_file_of_ones_own_is_a_version_with_one_model(blobs, tmp_path):
    path = tmp_path / "mine.onnx"
    path.write_bytes(model_bytes(5, classes='["robin", "wren", "jay"]', test_accuracy="0.75"))
    release = release_file(path, "mine-1", blobs, BIRDS)
    (model,) = release.models
    assert (release.version, model.name, release.classes) == ("mine-1", "mine-1", BIRDS.classes)
    assert [(file.precision, file.test_metric) for file in model.files] == [("float32", 0.75)]


def test_a_file_that_says_nothing_of_classes_has_the_federations(blobs, tmp_path):
    path = tmp_path / "mine.onnx"
    path.write_bytes(model_bytes(5))
    assert release_file(path, "mine-1", blobs, BIRDS).classes == BIRDS.classes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a model", "no ONNX file|has 0 inputs"),
        (model_bytes(5, n_inputs=7), r"takes samples of shape \(7,\), the federation's are \(6,\)"),
        (model_bytes(5, n_outputs=4), "gives 4 outputs for a sample, the federation has 3"),
        (model_bytes(5, classes='["robin", "wren", "owl"]'), "does not know the class 'jay'"),
        (model_bytes(5, classes="[robin"), "what it says about itself cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_the_federation_is_refused(blobs, tmp_path, content, words):
    path = tmp_path / "mine.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        release_file(path, "mine-1", blobs, BIRDS)


def test_classes_in_another_order_are_said(blobs, tmp_path, caplog):
    path = tmp_path / "mine.onnx"
    path.write_bytes(model_bytes(5, classes='["jay", "wren", "robin"]'))
    with caplog.at_level(logging.WARNING):
        assert release_file(path, "mine-1", blobs, BIRDS).classes == ("jay", "wren", "robin")
    assert "jay, wren, robin" in caplog.text


def test_a_name_that_no_topic_takes_is_refused(blobs, tmp_path):
    with pytest.raises(ConfigError, match="version 'a/b' must be"):
        release_file(tmp_path / "mine.onnx", "a/b", blobs, MODEL)
    with pytest.raises(ConfigError, match=r"mine\.onnx cannot be read"):
        release_file(tmp_path / "mine.onnx", "ab", blobs, MODEL)
