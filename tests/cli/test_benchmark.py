"""`benchmark`: figures of each model, side by side where there are several, and accuracy where there are data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reft_edge.cli.main import main
from tests.agent.serving.onnx_files import SHAPE, linear_onnx, serve, write_agent_toml

SHORT = ("--seconds", "0.2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.onnx").write_bytes(linear_onnx([0, 1], metadata={"classes": '["a", "b"]'}))
    (tmp_path / "two.onnx").write_bytes(linear_onnx([1, 0], metadata={"classes": '["a", "b"]'}))
    return tmp_path


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["benchmark", *arguments, *SHORT, "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)["models"]


@pytest.mark.usefixtures("folder")
def test_a_models_figures_are_in_their_order(capsys):
    (found,) = measured(capsys, "one.onnx", "--batch", "1,16")
    assert (found["name"], found["version"], found["threads"], found["inputs"]) == ("one.onnx", "one", 1, "random")
    assert 0 < found["latency_p50_s"] <= found["latency_p95_s"] <= found["latency_p99_s"]
    assert [each["batch"] for each in found["throughput"]] == [1, 16]
    assert all(each["per_s"] > 0 for each in found["throughput"])
    assert found["load_s"] > 0
    assert found["peak_rss_bytes"] >= found["pss_bytes"] > found["model_bytes"] >= 0
    assert (found["accuracy"], found["samples"]) == (None, 0)


@pytest.mark.usefixtures("folder")
def test_several_models_stand_side_by_side_each_from_its_own_process(capsys):
    assert main(["benchmark", "one.onnx", "two.onnx", *SHORT, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["one.onnx", "two.onnx"]
    assert [line.split()[-1] for line in lines if line.startswith("batches of")] == ["/s", "/s"]
    assert lines[-1] == "1 thread, random inputs"
    assert len({len(line) for line in lines[2:9]}) == 1, "columns are aligned"


def test_real_samples_give_the_accuracy_by_the_models_own_classes(folder, capsys):
    """Labels of the data are `b` and `a` in their own order."""
    targets = np.array([0, 0, 0, 1])
    np.savez(folder / "data.npz", inputs=np.zeros((4, *SHAPE), np.float32), targets=targets)
    (found,) = measured(capsys, "one.onnx", "--data", "data.npz")
    assert (found["accuracy"], found["mse"], found["samples"]) == (0.25, None, 4)
    assert found["inputs"].endswith("data.npz")


def test_a_model_of_numbers_gives_its_squared_error(folder, capsys):
    (folder / "three.onnx").write_bytes(linear_onnx([3]))
    np.savez(folder / "data.npz", inputs=np.zeros((2, *SHAPE), np.float32), targets=np.array([1.0, 4.0]))
    (found,) = measured(capsys, "three.onnx", "--data", "data.npz")
    assert (found["accuracy"], found["mse"]) == (None, 2.5)


def test_what_the_device_serves_is_measured_with_the_agents_own_data_and_is_not_counted(folder, capsys):
    (folder / "spool" / "serving").mkdir(parents=True)
    serve(folder / "spool", "v1", linear_onnx([0, 1], shape=(2,)), classes=("off", "on"))
    settings = write_agent_toml(folder, serving="report = true")
    data = '[data]\npath = "d.csv"\ntarget_column = "state"'
    settings.write_text(settings.read_text().replace('[data]\npath = "data"', data))
    (folder / "d.csv").write_text("x,y,state\n1,2,on\n3,4,off\n")
    (found,) = measured(capsys, "--data", "d.csv")
    assert (found["name"], found["version"], found["accuracy"]) == ("agent.toml", "v1", 0.5)
    assert not list((folder / "spool" / "serving" / "counts").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["away.onnx"], 2, "away.onnx: no such file"),
        (["one.onnx", "away.onnx"], 2, "away.onnx: no such file"),
        (["one.onnx", "--data", "away.npz"], 3, "does not exist"),
        (["one.onnx", "--data", "numbers.npz"], 3, "the model predicts classes, but the targets are numbers"),
    ],
)
def test_what_is_wrong_is_one_line(folder, capfd, arguments, code, message):
    np.savez(folder / "numbers.npz", inputs=np.zeros((2, *SHAPE), np.float32), targets=np.array([0.5, 1.5]))
    assert main(["benchmark", *arguments, *SHORT, "--quiet"]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("option", [("--batch", "8,x"), ("--seconds", "soon"), ("--threads", "0")])
@pytest.mark.usefixtures("folder")
def test_an_option_that_is_no_number_is_one_line(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "one.onnx", *option])
    assert len(capsys.readouterr().err.splitlines()) == 1
