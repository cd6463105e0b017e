"""Counts of processes are summed, survive their end, and are neither lost nor doubled by a kill at any moment."""

from __future__ import annotations

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
    MAX_VERSIONS,
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
        writer.add(each, duration_s=duration_s)
    writer.close()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.json"))


def test_what_was_predicted_is_counted_by_class_and_by_confidence(tmp_path):
    counted(tmp_path, prediction(0, 2, 2), prediction(2, confidence=1.0))
    found = read_counts(tmp_path, "v1")
    assert found is not None
    assert (found.predictions, found.errors) == (4, 0)
    assert found.classes == (1, 0, 3)
    assert found.confidence == (0, 0, 0, 0, 0, 0, 0, 3, 0, 1)
    assert found.latency_p95_s == pytest.approx(0.01, rel=0.2)
    assert found.latency_p95_s >= 0.01
    assert decode_condition(module.msgspec.json.encode(Condition(counts=found))).counts == found


def test_versions_are_counted_apart_and_a_version_that_nobody_used_has_no_counts(tmp_path):
    counted(tmp_path, prediction(0), prediction(1, 1, version="v2"))
    found = [read_counts(tmp_path, version) for version in ("v1", "v2", "v3")]
    assert [each and each.predictions for each in found] == [1, 2, None]
    assert read_counts(tmp_path / "away", "v1") is None


def test_a_model_of_numbers_counts_samples_only(tmp_path):
    numbers = Prediction(version="v1", model="global", outputs=np.zeros((5, 1), np.float32), probabilities=None)
    counted(tmp_path, numbers)
    found = read_counts(tmp_path, "v1")
    assert found is not None
    assert (found.predictions, found.classes, found.confidence) == (5, (), ())


def test_errors_are_counted(tmp_path):
    writer = CountsWriter(tmp_path)
    writer.add_error("v1")
    writer.close()
    assert read_counts(tmp_path, "v1") == PredictionCounts(version="v1", errors=1)


def test_classes_beyond_the_last_one_that_is_told_are_counted_together(tmp_path):
    counted(tmp_path, prediction(MAX_COUNTED_CLASSES - 1, MAX_COUNTED_CLASSES + 5, n_classes=MAX_COUNTED_CLASSES + 9))
    found = read_counts(tmp_path, "v1")
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
        writer.add(prediction(1), duration_s=0.01)
        while (found := read_counts(tmp_path, "v1")) is None or found.predictions < number:
            pass
        fold_ended(tmp_path)
        assert len(files(tmp_path)) == 1, "it has not ended"
    writer.close()


COUNTING = """
import sys
from pathlib import Path
from tests.agent.serving.test_counts import CountsWriter, prediction
writer = CountsWriter(Path(sys.argv[1]), write_every_s=0.001)
writer.add(prediction(0, 1), duration_s=0.01)
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
        while (found := read_counts(tmp_path, "v1")) is None or found.predictions < 3:
            pass
        assert len(files(tmp_path)) == 2, "its own, and that of those that have ended"
        process.kill()
        process.wait()
    fold_ended(tmp_path)
    assert files(tmp_path) == ["ended.json"]
    found = read_counts(tmp_path, "v1")
    assert found is not None
    assert (found.predictions, found.classes) == (3, (1, 1, 1))


def test_files_stay_few_however_many_processes_have_predicted(tmp_path):
    for number in range(20):
        counted(tmp_path, prediction(0, version=f"v{number}"), prediction(0))
    assert len(files(tmp_path)) <= 2
    found = read_counts(tmp_path, "v1")
    assert found is not None
    assert found.predictions == 21
    fold_ended(tmp_path)
    kept = json.loads((tmp_path / "ended.json").read_text())["versions"]
    assert len(kept) == MAX_VERSIONS
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
        found = read_counts(tmp_path, "v1")
        assert found is not None
        assert found.predictions == 2
        fold_ended(tmp_path)
    assert files(tmp_path) == ["ended.json"]


def test_files_that_are_no_counts_are_ignored(tmp_path, caplog):
    counted(tmp_path, prediction(0))
    (tmp_path / "1-1.json").write_bytes(b"\xff")
    (tmp_path / "1-2.json").write_text('{"versions": {"v1": {"predictions": -5}}}')
    (tmp_path / "1-3.json").write_text(" " * (module.MAX_FILE_BYTES + 1))
    found = read_counts(tmp_path, "v1")
    assert found is not None
    assert found.predictions == 1
    assert "is of no use and is ignored" in caplog.text


def test_where_nothing_can_be_written_predicting_goes_on_and_it_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        writer = CountsWriter(tmp_path / "file" / "counts", write_every_s=0.001)
        for _ in range(3):
            writer.add(prediction(0), duration_s=0.01)
        writer.close()
    assert len(caplog.records) == 1
    assert "what is predicted cannot be counted" in caplog.text


def test_nothing_but_counts_is_written(tmp_path):
    writer = CountsWriter(tmp_path)
    writer.add(prediction(1, 2), duration_s=0.0123)
    writer.close()
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith(f"{os.getpid()}-")
    content = json.loads(path.read_text())
    assert content.keys() == {"versions", "folded"}
    (counts,) = content["versions"].values()
    assert counts.keys() == {"predictions", "errors", "classes", "confidence", "latency"}
    assert path.stat().st_mode & 0o077 == 0
