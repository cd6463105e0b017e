"""A predictor follows what the device serves; no call fails or waits because of it."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import reft_edge.agent
from reft_edge.agent.serving import predictor as module
from reft_edge.agent.serving.counts import read_counts
from reft_edge.agent.serving.onnx_model import BATCH, OnnxModel
from reft_edge.agent.serving.predictor import NothingServedError, Predictor
from reft_edge.agent.serving.slots import MODEL, Slots
from reft_edge.errors import ConfigError, DataError, ModelError, ResourceError
from tests.agent.serving.onnx_files import SHAPE, linear_onnx, serve, write_agent_toml

ONE = np.ones((1, *SHAPE), np.float32)


def numbered(number: int) -> bytes:
    """A model that says its number in each output; with three classes."""
    return linear_onnx([number, number + 0.5, number])


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "spool" / "serving").mkdir(parents=True)
    return tmp_path / "spool"


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    ready = threading.Event()
    for _ in range(20_000):
        if is_so():
            return
        ready.wait(0.001)
    pytest.fail("it did not happen")


def version_of(predictor: Predictor) -> str:
    return predictor.predict(ONE).version


def test_it_is_found_where_a_user_looks_for_it():
    assert reft_edge.agent.Predictor is Predictor


def test_a_plain_file_predicts_by_its_own_name(tmp_path):
    (tmp_path / "own.onnx").write_bytes(linear_onnx([1, 3, 2]))
    found = Predictor(tmp_path / "own.onnx").predict(np.zeros((2, *SHAPE), np.uint8))
    assert (found.version, found.model, found.labels) == ("own", "own", ("1", "1"))
    assert found.outputs.shape == (2, 3)
    assert found.confidence == pytest.approx([np.exp(3) / np.exp([1, 2, 3]).sum()] * 2)


def test_a_model_of_numbers_has_no_labels(tmp_path):
    (tmp_path / "own.onnx").write_bytes(linear_onnx([1, 3], metadata={"task": "regression", "run": "run-7"}))
    found = Predictor(tmp_path / "own.onnx").predict(ONE)
    assert (found.version, found.labels, found.confidence, found.indices) == ("run-7", (), None, None)


@pytest.mark.parametrize("by", ["settings", "spool"])
def test_what_the_device_serves_is_found_by_its_settings_or_its_spool(tmp_path, spool, by):
    serve(spool, "v1", numbered(1), classes=("a", "b", "c"))
    source = write_agent_toml(tmp_path) if by == "settings" else spool
    found = Predictor(source).predict(ONE)
    assert (found.version, found.model, found.labels) == ("v1", "global", ("b",))


def test_nothing_served_says_what_to_do_and_the_first_version_is_waited_for(tmp_path, spool):
    predictor = Predictor(write_agent_toml(tmp_path))
    with pytest.raises(NothingServedError, match=r"agent\.toml serves no model yet; deploy one"):
        predictor.predict(ONE)
    serve(spool, "v1", numbered(1))
    assert version_of(predictor) == "v1"


def test_calls_go_on_with_the_old_version_while_the_new_one_loads(spool, monkeypatch):
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)
    may_load, loads = threading.Event(), threading.Event()

    def slowly(*args, **options) -> OnnxModel:
        loads.set()
        assert may_load.wait(60)
        return OnnxModel(*args, **options)

    monkeypatch.setattr(module, "OnnxModel", slowly)
    serve(spool, "v2", numbered(2))
    assert version_of(predictor) == "v1"
    assert loads.wait(60)
    assert {version_of(predictor) for _ in range(50)} == {"v1"}
    may_load.set()
    until(lambda: version_of(predictor) == "v2")


def test_a_call_ends_on_the_version_that_it_began_with(spool, monkeypatch):
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)
    old = predictor.served().onnx
    may_go_on, begun = threading.Event(), threading.Event()
    checked = old.checked

    def slowly(inputs: object):
        begun.set()
        assert may_go_on.wait(60)
        return checked(inputs)

    monkeypatch.setattr(old, "checked", slowly)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(predictor.predict, ONE)
        assert begun.wait(60)
        serve(spool, "v2", numbered(2))
        until(lambda: predictor.served().version == "v2")
        may_go_on.set()
        found = call.result()
    assert (found.version, found.outputs[0, 0]) == ("v1", 1)


def test_inputs_that_were_made_for_one_version_are_predicted_by_it(spool):
    """A picture is resized for a model; the next one may take another size."""
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)
    old = predictor.served()
    serve(spool, "v2", linear_onnx([2, 2, 2], shape=(3, 8, 8)))
    until(lambda: predictor.served().version == "v2")
    assert predictor.predict(ONE, by=old).version == "v1"
    with pytest.raises(DataError, match=r"v2 \(global\) takes \(n, 3, 8, 8\)"):
        predictor.predict(ONE)


def test_the_old_model_is_let_go(spool):
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)
    old = weakref.ref(predictor.served().onnx)
    serve(spool, "v2", numbered(2))
    until(lambda: version_of(predictor) == "v2")
    gc.collect()
    assert old() is None


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger="reft_edge.agent.serving.predictor"):
        yield lambda: [record.getMessage() for record in caplog.records]


def damage(spool: Path) -> None:
    """Flip a byte of what is served; its size stays."""
    path = Slots(spool / "serving").current().path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_version_is_told_of_once_and_the_old_one_goes_on(spool, warnings_of):
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)
    serve(spool, "v2", numbered(2))
    damage(spool)
    until(lambda: version_of(predictor) == "v1" and len(warnings_of()) == 1)
    assert {version_of(predictor) for _ in range(20)} == {"v1"}
    (only,) = warnings_of()
    assert "v2 is damaged on disk" in only
    assert only.endswith("v1 is served")


def test_a_process_that_starts_on_a_damaged_version_serves_the_one_before(spool, warnings_of):
    serve(spool, "v1", numbered(1))
    serve(spool, "v2", numbered(2))
    damage(spool)
    predictor = Predictor(spool)
    assert version_of(predictor) == "v1"
    assert len(warnings_of()) == 1


def test_a_damaged_version_without_another_is_the_error_of_every_call(spool):
    serve(spool, "v1", numbered(1))
    damage(spool)
    predictor = Predictor(spool)
    for _ in range(2):
        with pytest.raises(NothingServedError, match="v1 is damaged on disk"):
            predictor.predict(ONE)


def test_a_file_that_is_no_model_leaves_the_old_one(spool, warnings_of):
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)
    serve(spool, "v2", b"no model at all")
    until(lambda: (version_of(predictor), len(warnings_of())) == ("v1", 1))
    serve(spool, "v3", numbered(3))
    until(lambda: version_of(predictor) == "v3")


def test_a_version_without_memory_is_tried_again(spool, monkeypatch, warnings_of):
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)

    def fail(*_: object, **__: object) -> OnnxModel:
        raise ResourceError("not enough memory to load v2")

    monkeypatch.setattr(module, "RETRY_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(module, "OnnxModel", fail)
        serve(spool, "v2", numbered(2))
        until(lambda: (version_of(predictor), len(warnings_of())) == ("v1", 1))
    until(lambda: version_of(predictor) == "v2")


def test_undoing_returns_to_the_version_before_and_then_to_nothing(spool):
    serve(spool, "v1", numbered(1))
    serve(spool, "v2", numbered(2))
    predictor = Predictor(spool)
    assert version_of(predictor) == "v2"
    slots = Slots(spool / "serving")
    slots.roll_back()
    until(lambda: version_of(predictor) == "v1")
    slots.roll_back()
    with pytest.raises(NothingServedError):
        until(lambda: version_of(predictor) != "v1")


def test_a_spool_that_is_out_of_reach_takes_no_model_away(spool):
    serve(spool, "v1", numbered(1))
    predictor = Predictor(spool)
    (spool / "serving").rename(spool / "elsewhere")
    assert {version_of(predictor) for _ in range(20)} == {"v1"}
    (spool / "elsewhere").rename(spool / "serving")
    serve(spool, "v2", numbered(2))
    until(lambda: version_of(predictor) == "v2")


def test_a_switch_that_is_overtaken_while_it_loads_leaves_the_newest(spool):
    predictor = Predictor(spool)
    for number in range(1, 16):
        serve(spool, f"v{number}", numbered(number))
        predictor.refresh()
    until(lambda: version_of(predictor) == "v15")


def test_many_threads_and_many_switches_give_whole_answers_only(spool):
    serve(spool, "v0", numbered(0))
    predictor = Predictor(spool)
    stop = threading.Event()

    def call() -> int:
        calls, newest = 0, 0
        while not stop.is_set():
            found = predictor.predict(np.repeat(ONE, 3, axis=0))
            number = int(found.version.removeprefix("v"))
            assert np.array_equal(found.outputs, [[number, number + 0.5, number]] * 3)
            assert number >= newest
            calls, newest = calls + 1, number
        return calls

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call) for _ in range(4)]
        for number in range(1, 13):
            serve(spool, f"v{number}", numbered(number))
            until(lambda number=number: predictor.served().version == f"v{number}")
        stop.set()
        assert all(each.result() > 0 for each in calls)


def test_wrong_inputs_are_data_errors_that_name_the_version(spool):
    serve(spool, "v1", numbered(1))
    with pytest.raises(DataError, match=r"v1 \(global\) takes \(n, 1, 4, 4\)"):
        Predictor(spool).predict([[1.0]])


def test_what_is_no_source_is_one_line(tmp_path):
    (tmp_path / "some.onnx").write_bytes(b"")
    for source, kind, message in (
        (tmp_path, ConfigError, "is no agent's spool; name an agent.toml"),
        (tmp_path / "away.onnx", ConfigError, "no such file"),
        (tmp_path / "away.toml", ConfigError, "no such file"),
        (tmp_path / "some.onnx", ModelError, "cannot be used"),
    ):
        with pytest.raises(kind, match=message):
            Predictor(source)


@pytest.mark.parametrize("name", ["serving", "serving/current.json", "serving/a"])
def test_what_this_process_may_not_read_is_not_taken_for_nothing(tmp_path, spool, name):
    serve(spool, "v1", numbered(1))
    path = spool / name
    path.rename(tmp_path / "away")
    path.symlink_to(path.name)  # a circle cannot be read by root either
    predictor = Predictor(write_agent_toml(tmp_path))
    with pytest.raises(NothingServedError, match=r"cannot be read: .*; be the user that the agent runs as$"):
        predictor.predict(ONE)


def errors_of(spool: Path, version: str) -> int:
    found = read_counts(spool / "serving" / "counts", f"roll-out-of-{version}", version)
    return 0 if found is None else found.errors


def test_predictions_are_counted_only_where_the_owner_allows_it(tmp_path, spool):
    serve(spool, "v1", numbered(1))
    counts = spool / "serving" / "counts"
    for source in (write_agent_toml(tmp_path), spool):
        with Predictor(source) as predictor:
            predictor.predict(ONE)
        assert not counts.exists()
    with Predictor(write_agent_toml(tmp_path, serving="report = true")) as predictor:
        predictor.predict(ONE)
        with pytest.raises(DataError):
            predictor.predict([1.0])
    found = read_counts(counts, "roll-out-of-v1", "v1")
    assert found is not None
    assert (found.predictions, found.errors, found.classes) == (1, 0, (0, 1))


def test_an_answer_that_is_no_number_is_the_models_error_and_is_counted_as_one(tmp_path, spool):
    serve(spool, "v1", linear_onnx([0, 0, 0], gain=1))
    with Predictor(write_agent_toml(tmp_path, serving="report = true")) as predictor:
        inputs = np.ones((3, *SHAPE), np.float32)
        inputs[1] = 3e38
        with pytest.raises(ModelError, match=r"^version v1 \(global\) answers sample 1 \(1 of 3 samples\) with what"):
            predictor.predict(inputs)
    assert errors_of(spool, "v1") == 1


@pytest.mark.parametrize("source", ["agent.toml", "spool"])
def test_errors_are_counted_wherever_a_device_serves(tmp_path, spool, source):
    write_agent_toml(tmp_path)
    serve(spool, "v1", linear_onnx([0, 0, 0], gain=1))
    with Predictor(tmp_path / source) as predictor, pytest.raises(ModelError):
        predictor.predict(np.full((1, *SHAPE), 3e38, np.float32))
    assert errors_of(spool, "v1") == 1


def test_memory_is_the_models_error_but_not_for_more_samples_at_once_than_usual(spool, monkeypatch):
    serve(spool, "v1", numbered(1))

    def no_room(*_: object, **__: object) -> None:
        raise ResourceError("not enough memory")

    with Predictor(spool) as predictor:
        monkeypatch.setattr(OnnxModel, "run", no_room)
        for batch_size in (1, BATCH, BATCH + 1):
            with pytest.raises(ResourceError):
                predictor.predict(ONE, batch_size=batch_size)
    assert errors_of(spool, "v1") == 2


def test_a_version_that_does_not_load_has_an_error_and_what_serves_meanwhile_has_none(spool):
    serve(spool, "v1", numbered(1))
    with Predictor(spool) as predictor:
        serve(spool, "v2", b"this is no model")
        while errors_of(spool, "v2") != 1:
            assert predictor.predict(ONE).version == "v1"
    assert errors_of(spool, "v1") == 0


def test_a_class_that_cannot_be_has_probability_zero(tmp_path):
    (tmp_path / "own.onnx").write_bytes(linear_onnx([0, -np.inf]))
    assert Predictor(tmp_path / "own.onnx").predict(ONE).probabilities.tolist() == [[1, 0]]


def test_a_slot_that_is_written_again_while_it_is_read_is_not_taken_for_another(spool, monkeypatch):
    """What is loaded is what was hashed: the file was opened before it was replaced."""
    serve(spool, "v1", numbered(1))

    def replaced(path: Path, **options) -> OnnxModel:
        served = Slots(spool / "serving").current().path
        served.unlink()
        served.write_bytes(numbered(9))
        assert served.name == MODEL
        return OnnxModel(path, **options)

    monkeypatch.setattr(module, "OnnxModel", replaced)
    found = Predictor(spool).predict(ONE)
    assert (found.version, found.outputs[0, 0]) == ("v1", 1)
