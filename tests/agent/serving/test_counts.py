"""Counts of processes are summed, survive their end, and are neither lost nor doubled by a kill at any moment."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reft_edge.agent.serving import counts as module
from reft_edge.agent.serving.counts import (
    LATENCY_EDGES_S,
    MAX_DEPLOYMENTS,
    CountsWriter,
    confidence_bin,
    fold_ended,
    latency_percentile,
    read_counts,
)
from reft_edge.agent.serving.prediction import Prediction
from reft_edge.wire.deployment import MAX_COUNTED_CLASSES, Condition, PredictionCounts, decode_condition


def prediction(*classes: int, confidence: float = 0.75, n_classes: int = 3, version: str = "v1") -> Prediction:
    probabilities = np.full((len(classes), n_classes), (1 - confidence) / max(1, n_classes - 1), dtype=np.float32)
    probabilities[np.arange(len(classes)), classes] = confidence
    return Prediction(version=version, model="global", outputs=probabilities, probabilities=probabilities)


def counted(folder: Path, *predictions: Prediction, duration_s: float = 0.01) -> None:
    """By a process that has ended, as far as its file tells."""
    writer = CountsWriter(folder)
    for each in predictions:
        writer.add(each.version, each, duration_s=duration_s)
    writer.close()


def counts_of(folder: Path, version: str = "v1") -> PredictionCounts | None:
    """Here a deployment has the name of its version."""
    return read_counts(folder, version, version)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.json"))


def test_what_was_predicted_is_counted_by_class_and_by_confidence(tmp_path):
    counted(tmp_path, prediction(0, 2, 2), prediction(2, confidence=1.0))
    found = counts_of(tmp_path)
    assert found is not None
    assert (found.predictions, found.errors) == (4, 0)
    assert found.classes == (1, 0, 3)
    assert found.confidence == (0, 0, 0, 0, 0, 0, 0, 3, 0, 1)
    assert found.latency_p95_s == pytest.approx(0.01, rel=0.2)
    assert found.latency_p95_s >= 0.01
    assert decode_condition(module.msgspec.json.encode(Condition(counts=found))).counts == found


def test_deployments_are_counted_apart_and_one_that_nobody_used_has_no_counts(tmp_path):
    counted(tmp_path, prediction(0), prediction(1, 1, version="v2"))
    found = [counts_of(tmp_path, version) for version in ("v1", "v2", "v3")]
    assert [each and each.predictions for each in found] == [1, 2, None]
    assert counts_of(tmp_path / "away") is None


def test_a_model_of_numbers_counts_samples_only(tmp_path):
    numbers = Prediction(version="v1", model="global", outputs=np.zeros((5, 1), np.float32), probabilities=None)
    counted(tmp_path, numbers)
    found = counts_of(tmp_path)
    assert found is not None
    assert (found.predictions, found.classes, found.confidence) == (5, (), ())


def test_a_version_that_is_deployed_once_more_begins_without_errors(tmp_path):
    writer = CountsWriter(tmp_path)
    writer.add_error("first")
    writer.add("second", prediction(0), duration_s=0.01)
    writer.close()
    assert read_counts(tmp_path, "first", "v1") == PredictionCounts(version="v1", errors=1)
    second = read_counts(tmp_path, "second", "v1")
    assert second is not None
    assert (second.version, second.predictions, second.errors) == ("v1", 1, 0)


def test_the_first_error_is_written_at_once_and_so_is_that_of_the_next_deployment(tmp_path):
    writer = CountsWriter(tmp_path, write_every_s=3600)
    for version in ("v1", "v2"):
        writer.add_error(version)
        while counts_of(tmp_path, version) != PredictionCounts(version=version, errors=1):
            pass
    writer.add_error("v1")
    writer.close()
    assert counts_of(tmp_path) == PredictionCounts(version="v1", errors=2)


def test_where_errors_only_are_allowed_nothing_else_is_counted_or_told(tmp_path):
    counted(tmp_path, prediction(0, 1))  # when it was allowed
    writer = CountsWriter(tmp_path, errors_only=True)
    writer.add("v1", prediction(2), duration_s=0.01)
    assert read_counts(tmp_path, "v1", "v1", errors_only=True) is None
    writer.add_error("v1")
    writer.close()
    assert read_counts(tmp_path, "v1", "v1", errors_only=True) == PredictionCounts(version="v1", errors=1)
    own = next(path for path in tmp_path.glob("*.json") if path.name != "ended.json")
    assert '"classes":[]' in own.read_text()


def test_a_process_that_counts_nothing_writes_nothing(tmp_path):
    writer = CountsWriter(tmp_path / "counts", errors_only=True)
    writer.add("v1", prediction(2), duration_s=0.01)
    writer.close()
    assert not (tmp_path / "counts").exists()


def test_classes_beyond_the_last_one_that_is_told_are_counted_together(tmp_path):
    counted(tmp_path, prediction(MAX_COUNTED_CLASSES - 1, MAX_COUNTED_CLASSES + 5, n_classes=MAX_COUNTED_CLASSES + 9))
    found = counts_of(tmp_path)
    assert found is not None
    assert (len(found.classes), found.classes[-1]) == (MAX_COUNTED_CLASSES, 2)


def test_confidence_has_bins_of_equal_width():
    assert [confidence_bin(share) for share in (0, 0.0999, 0.1, 0.95, 1.0)] == [0, 0, 1, 9, 9]


def test_the_percentile_is_the_upper_edge_of_its_bin():
    bins = [0] * 10
    bins[3], bins[7] = 94, 6
    assert latency_percentile(bins, 0.5) == LATENCY_EDGES_S[3]
    assert latency_percentile(bins, 0.95) == LATENCY_EDGES_S[7]
    assert latency_percentile([], 0.95) is None
    assert latency_percentile([0] * len(LATENCY_EDGES_S) + [1], 0.95) == LATENCY_EDGES_S[-1]


def test_a_process_that_goes_on_is_read_while_it_does(tmp_path):
    writer = CountsWriter(tmp_path, write_every_s=0.001)
    for number in range(1, 4):
        writer.add("v1", prediction(1), duration_s=0.01)
        while (found := counts_of(tmp_path)) is None or found.predictions < number:
            pass
        fold_ended(tmp_path)
        assert len(files(tmp_path)) == 1, "it has not ended"
    writer.close()


COUNTING = """
import sys
from pathlib import Path
from tests.agent.serving.test_counts import CountsWriter, prediction
writer = CountsWriter(Path(sys.argv[1]), write_every_s=0.001)
writer.add("v1", prediction(0, 1), duration_s=0.01)
print("counts", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_keeps_what_it_has_written_and_the_next_one_folds_it(tmp_path):
    counted(tmp_path, prediction(2))
    with subprocess.Popen(
        [sys.executable, "-c", COUNTING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while (found := counts_of(tmp_path)) is None or found.predictions < 3:
            pass
        assert len(files(tmp_path)) == 2, "its own, and that of those that have ended"
        process.kill()
        process.wait()
    fold_ended(tmp_path)
    assert files(tmp_path) == ["ended.json"]
    found = counts_of(tmp_path)
    assert found is not None
    assert (found.predictions, found.classes) == (3, (1, 1, 1))


def test_what_a_killed_process_was_about_to_write_goes_with_its_file(tmp_path):
    counted(tmp_path, prediction(2))
    (path,) = tmp_path.glob("*.json")
    path.with_suffix(".tmp").write_text("{")
    fold_ended(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ended.json", "lock"]


def test_a_disk_that_takes_half_of_it_leaves_what_was_there(tmp_path, monkeypatch, caplog):
    counted(tmp_path, prediction(0))
    writer = CountsWriter(tmp_path, write_every_s=0.001)

    def full(descriptor: int, *_: object, **__: object) -> None:
        os.write(descriptor, b'{"depl')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "open", full, raising=False)
    writer.add("v1", prediction(1), duration_s=0.01)
    writer.close()
    found = counts_of(tmp_path)
    assert found is not None
    assert found.predictions == 1
    assert sorted(each.suffix for each in tmp_path.iterdir()) == ["", ".json"]
    assert "cannot be counted: [Errno 28] No space left on device" in caplog.text


def test_files_stay_few_however_many_processes_have_predicted(tmp_path):
    for number in range(20):
        counted(tmp_path, prediction(0, version=f"v{number}"), prediction(0))
    assert len(files(tmp_path)) <= 2
    found = counts_of(tmp_path)
    assert found is not None
    assert found.predictions == 21
    fold_ended(tmp_path)
    kept = json.loads((tmp_path / "ended.json").read_text())["deployments"]
    assert len(kept) == MAX_DEPLOYMENTS
    assert list(kept)[-1] == "v1"


@pytest.mark.parametrize("step", ["before the sum is written", "before the files are removed"])
def test_a_kill_while_folding_neither_loses_nor_doubles(tmp_path, monkeypatch, step):
    counted(tmp_path, prediction(0, 0))

    class KilledError(Exception):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        if step == "before the sum is written":
            patch.setattr(module, "write_atomically", killed)
        else:
            remove = module._remove
            patch.setattr(module, "_remove", lambda folder, names: killed() if names else remove(folder, names))
        with pytest.raises(KilledError):
            fold_ended(tmp_path)
    for _ in range(3):
        found = counts_of(tmp_path)
        assert found is not None
        assert found.predictions == 2
        fold_ended(tmp_path)
    assert files(tmp_path) == ["ended.json"]


def test_files_that_are_no_counts_are_ignored(tmp_path, caplog):
    counted(tmp_path, prediction(0))
    (tmp_path / "1-1.json").write_bytes(b"\xff")
    (tmp_path / "1-2.json").write_text('{"deployments": {"v1": {"predictions": -5}}}')
    (tmp_path / "1-3.json").write_text(" " * (module.MAX_FILE_BYTES + 1))
    found = counts_of(tmp_path)
    assert found is not None
    assert found.predictions == 1
    assert caplog.text == ""  # the daemon reads them every minute
    (tmp_path / "ended.json").write_text('{"deployments": {}, "folded": ["../kept.json"]}')
    (tmp_path.parent / "kept.json").write_text("")
    fold_ended(tmp_path)
    assert caplog.text.count("is of no use and is removed") == 3
    assert files(tmp_path) == ["ended.json"]
    assert (tmp_path.parent / "kept.json").exists()


def test_where_nothing_can_be_written_predicting_goes_on_and_it_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        writer = CountsWriter(tmp_path / "file" / "counts", write_every_s=0.001)
        for _ in range(3):
            writer.add("v1", prediction(0), duration_s=0.01)
        writer.close()
    assert len(caplog.records) == 1
    assert "what is predicted cannot be counted" in caplog.text


def test_nothing_but_counts_is_written(tmp_path):
    writer = CountsWriter(tmp_path)
    writer.add("v1", prediction(1, 2), duration_s=0.0123)
    writer.close()
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith(f"{os.getpid()}-")
    content = json.loads(path.read_text())
    assert content.keys() == {"deployments", "folded"}
    (counts,) = content["deployments"].values()
    assert counts.keys() == {"predictions", "errors", "classes", "confidence", "latency"}
    assert path.stat().st_mode & 0o077 == 0
