"""`predict`: files of every kind through the readers of training data, and a bad one among them costs only itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image

from reft_edge.agent.serving.counts import read_counts
from reft_edge.cli.main import main
from tests.agent.serving.onnx_files import SHAPE, linear_onnx, serve, write_agent_toml

BIRDS = {"metadata": {"classes": '["robin", "great tit"]', "run": "run-3"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a classifier, `birds.onnx`, that says `great tit` to all that is not black."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds.onnx").write_bytes(linear_onnx([0.5, 0.0], gain=0.0, **BIRDS))
    return tmp_path


def draw(path: Path, brightness: int = 255, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (brightness,) * 3).save(path)
    return path


def predict(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[list[str], list[str]]:
    """Lines of output and of errors."""
    assert main(["predict", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def test_pictures_and_folders_are_told_in_order_one_a_line(folder, capsys):
    draw(folder / "b.png")
    for number in range(3):
        draw(folder / "all" / "tits" / f"{number}.jpg")
    lines, errors = predict(capsys, "b.png", "all", "--model", "birds.onnx", "--batch", "2")
    assert errors == []
    assert [line.split()[-1] for line in lines] == ["b.png", *(f"all/tits/{number}.jpg" for number in range(3))]
    assert lines[0] == "robin       62.2%  b.png"


def test_lines_of_json_say_all_that_there_is(folder, capsys):
    draw(folder / "b.png")
    (line,), _ = predict(capsys, "b.png", "--model", "birds.onnx", "--json")
    found = json.loads(line)
    assert found.pop("confidence") == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert found == {
        "file": "b.png", "version": "run-3", "model": "birds", "label": "robin", "index": 0, "outputs": [0.5, 0.0],
    }  # fmt: skip


def test_arrays_are_samples_with_their_index(folder, capsys):
    (folder / "sum.onnx").write_bytes(linear_onnx([0], gain=1))
    np.savez(folder / "a.npz", inputs=np.stack([np.full(SHAPE, number, np.float32) for number in range(5)]))
    lines, _ = predict(capsys, "a.npz", "--model", "sum.onnx", "--batch", "2")
    assert [line.split() for line in lines] == [[str(16 * number), f"a.npz[{number}]"] for number in range(5)]
    lines, _ = predict(capsys, "a.npz", "--model", "sum.onnx", "--json")
    assert [(json.loads(line)["sample"], json.loads(line)["outputs"]) for line in lines][:2] == [(0, [0]), (1, [16])]


def test_tables_are_read_as_the_agents_data_are(folder, capsys):
    """By the columns and windows of [data], without its targets."""
    (folder / "spool" / "serving").mkdir(parents=True)
    serve(folder / "spool", "v1", linear_onnx([0], gain=1, shape=(2, 3)))
    settings = write_agent_toml(folder)
    data = (
        '[data]\npath = "data.csv"\ncolumns = ["x", "y"]\ntarget_column = "label"\nwindow = 3\nholdout_fraction = 0.5'
    )
    settings.write_text(settings.read_text().replace('[data]\npath = "data"', data))
    (folder / "today.csv").write_text("time,x,y\n" + "".join(f"{row},{row},1\n" for row in range(6)))
    lines, _ = predict(capsys, "today.csv")
    assert [line.split() for line in lines] == [["6", "today.csv[0]"], ["15", "today.csv[1]"]]


def test_a_broken_file_among_others_is_named_and_the_others_are_predicted(folder, capsys):
    for number in range(40):
        draw(folder / "all" / f"{number:02}.png")
    (folder / "all" / "07.png").write_bytes(b"broken")
    (folder / "empty").mkdir()
    np.savez(folder / "wrong.npz", inputs=np.zeros((2, 3), np.float32))
    arguments = ("all", "empty", "away.png", "wrong.npz", "--model", "birds.onnx")
    lines, errors = predict(capsys, *arguments, code=3)
    assert len(lines) == 39
    broken, empty, away, wrong, summary = [line.removeprefix("reft-edge predict: ") for line in errors]
    assert broken == "all/07.png: the picture cannot be read (not a picture, or damaged)"
    assert empty == "empty: the folder has no pictures"
    assert away == "away.png: no such file"
    assert wrong.startswith(f"{folder}/wrong.npz: a sample has shape (3,)")
    assert summary == "samples predicted: 39; files that failed: 4"
    lines, _ = predict(capsys, *arguments, "--json", code=3)
    failed = [json.loads(line) for line in lines if "error" in line]
    assert [each["file"] for each in failed] == ["all/07.png", "empty", "away.png", "wrong.npz"]


def test_a_model_among_the_files_is_told_where_it_belongs(folder, capsys):
    lines, errors = predict(capsys, "birds.onnx", draw(folder / "b.png"), "--model", "birds.onnx", code=3)
    assert len(lines) == 1
    assert errors[0] == "reft-edge predict: birds.onnx is no file to predict; a model is named with --model"


def test_pictures_for_a_model_of_numbers_and_fractions_for_one_of_indices_are_explained(folder, capsys):
    (folder / "sensor.onnx").write_bytes(linear_onnx([0, 1], shape=(6,)))
    _, errors = predict(capsys, draw(folder / "b.png"), "--model", "sensor.onnx", code=3)
    assert "takes no pictures but samples of shape (6,)" in errors[0]
    (folder / "words.onnx").write_bytes(linear_onnx([0, 1], shape=(2,), dtype=TensorProto.INT64))
    np.savez(folder / "a.npz", inputs=np.full((3, 2), 0.5))
    _, errors = predict(capsys, "a.npz", "--model", "words.onnx", code=3)
    assert errors[0].startswith("reft-edge predict: a.npz: inputs have fractions")


def test_what_the_model_fails_on_is_told_with_its_file_and_the_others_are_predicted(folder, capsys):
    (folder / "sum.onnx").write_bytes(linear_onnx([0], gain=1))
    np.savez(folder / "a.npz", inputs=np.full((3, *SHAPE), 3e38, np.float32))
    np.savez(folder / "b.npz", inputs=np.ones((1, *SHAPE), np.float32))
    lines, errors = predict(capsys, "a.npz", "b.npz", "--model", "sum.onnx", code=4)
    assert [line.split() for line in lines] == [["16", "b.npz[0]"]]
    answer = "version sum (sum) answers sample 0 (3 of 3 samples) with what is no number"
    assert errors == [
        f"reft-edge predict: a.npz: {answer}",
        "reft-edge predict: samples predicted: 1; files that failed: 1",
    ]


def test_what_is_predicted_is_counted_where_the_owner_allows_it(folder, capsys):
    (folder / "spool" / "serving").mkdir(parents=True)
    serve(folder / "spool", "v1", linear_onnx([0, 1, 0]), classes=("a", "b", "c"))
    write_agent_toml(folder, serving="report = true")
    np.savez(folder / "a.npz", inputs=np.zeros((5, *SHAPE), np.float32))
    lines, _ = predict(capsys, "a.npz")
    assert len(lines) == 5
    found = read_counts(folder / "spool" / "serving" / "counts", "roll-out-of-v1", "v1")
    assert found is not None
    assert (found.predictions, found.classes) == (5, (0, 5))


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("agent.toml", 4, "agent.toml serves no model yet; deploy one (reft-edge deploy), or name an .onnx file"),
        ("away.onnx", 2, "away.onnx: no such file; name an agent.toml"),
        ("b.png", 4, "b.png cannot be used: "),
        (".", 2, "is no agent's spool"),
    ],
)
def test_a_model_that_is_none_is_one_line(folder, capsys, model, code, message):
    write_agent_toml(folder)
    draw(folder / "b.png")
    lines, errors = predict(capsys, "b.png", "--model", model, code=code)
    assert lines == []
    assert len(errors) == 1
    assert message in errors[0]
