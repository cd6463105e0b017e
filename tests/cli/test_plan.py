from __future__ import annotations

import json
from pathlib import Path

import pytest

from reft_edge.cli.main import main

PROFILE = """
name = "{name}"
cores = {{ value = 4, basis = "specified" }}
clock_hz = {{ value = 1e9, basis = "specified" }}
flops_per_cycle = {{ value = 8, basis = "specified" }}
training_flops_per_s = {{ value = {flops:e}, basis = "measured" }}
memory_total_bytes = {{ value = 4e9, basis = "specified" }}
memory_available_bytes = {{ value = {memory_bytes}, basis = "specified" }}
"""

OWN_MODEL = """
from torch import nn

def tiny(input_shape, n_outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, n_outputs))
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with three boards: fast, slow, and one with too little memory for anything."""
    monkeypatch.chdir(tmp_path)
    for name, flops, memory_mib in (("fast", 1e10, 2000), ("slow", 2e9, 2000), ("small", 1e10, 70)):
        text = PROFILE.format(name=name, flops=flops, memory_bytes=memory_mib * 2**20)
        Path(f"{name}.toml").write_text(text)
    Path("nets.py").write_text(OWN_MODEL)


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, dict[str, object]]:
    assert main(["plan", "--json", *arguments]) == code
    document = json.loads(capsys.readouterr().out)
    return {row["device"]: row for row in document["devices"]}


def test_a_limit_holds_for_the_fastest_device_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "mlp", "--profile", "fast.toml", "--ratios", "0,0.5"]
    limits = ["--limit", "parameters=20000", "--limit", "macs=18000"]
    row = plan_json(capsys, *arguments, *limits)["fast"]
    assert 15_000 < row["forward_macs"] <= 18_000
    assert row["parameters"] <= 20_000
    with pytest.raises(SystemExit):
        main(["plan", *arguments, "--limit", "macs"])
    assert "is not a limit like macs=70000000" in capsys.readouterr().err
    assert main(["plan", *arguments, "--limit", "flops=1"]) == 2
    assert "unknown key 'flops'" in capsys.readouterr().err


def test_each_device_gets_what_it_can_do_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "mlp", "--samples", "20000", "--deadline", "12", "--ratios", "0,0.5,0.75"]
    arguments += ["--profile", "fast.toml", "slow.toml", "small.toml"]
    rows = plan_json(capsys, *arguments)
    fast, slow, small = rows["fast"], rows["slow"], rows["small"]
    assert (fast["ratio"], fast["parameters"]) == (0.0, 51_594)
    assert slow["ratio"] > fast["ratio"]
    assert slow["parameters"] < fast["parameters"]
    for row in (fast, slow):
        assert row["round_s"] <= 12
        assert row["peak_memory_bytes"] <= row["memory_bytes"]
        assert row["down_bytes"] > row["up_bytes"] > 0
        assert 0 < row["later_down_bytes"] < row["down_bytes"]
    assert not small["fits"]
    assert "has 70 MiB" in str(small["reason"])

    assert main(["plan", *arguments]) == 0
    printed = capsys.readouterr()
    assert "small takes no part: needs" in printed.out
    assert "51,594" in printed.out
    assert "pruned and compiled" in printed.err


def test_a_plan_for_nobody_ends_with_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan_json(capsys, "--model", "mlp", "--profile", "small.toml", "small.toml", code=5)
    assert [row["fits"] for row in rows.values()] == [False, False]
    assert list(rows) == ["small", "small (2)"]


def test_own_models_and_federation_files(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--model", "nets:tiny", "--input-shape", "3,2,2", "--outputs", "3", "--profile", "fast.toml"]
    assert plan_json(capsys, *own)["fast"]["parameters"] == 13 * 16 + 17 * 3
    folder = Path("elsewhere")
    folder.mkdir()
    (folder / "nets.py").write_text(OWN_MODEL)
    (folder / "federation.toml").write_text(
        'federation = "f"\ndistillation = { epochs = 0 }\nplanning = { policy = "reft", ratios = [0, 0.5] }\n'
        '[model]\nname = "nets:tiny"\ninput_shape = [3, 2, 2]\nclasses = ["a", "b"]\n'
    )
    rows = plan_json(
        capsys, "--federation", "elsewhere/federation.toml", "--profile", "fast.toml", "slow.toml", "--batch-size", "8"
    )
    assert (rows["fast"]["ratio"], rows["slow"]["ratio"]) == (0.0, 0.5)
    assert rows["fast"]["steps"] == 2 * 1000 / 8
    assert "20% of the fastest" in str(rows["slow"]["reason"])


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--model", "vgg61", "--profile", "fast.toml"], 4, "did you mean 'vgg16'"),
        (["--model", "mlp", "--profile", "none.toml"], 2, "none.toml: no such file"),
        (["--model", "mlp", "--profile", "nets.py"], 2, "not valid TOML"),
        (["--model", "nets:tiny", "--profile", "fast.toml"], 2, "--input-shape"),
        (["--model", "mlp", "--profile", "fast.toml", "--policy", "fair"], 2, "deadline"),
        (["--model", "mlp", "--profile", "fast.toml", "--ratios", "0,1"], 2, "ratios"),
        (["--model", "mlp", "--profile", "fast.toml", "--epochs", "0"], 2, "local_epochs"),
        (["--model", "mlp", "--profile", "fast.toml", "--importance", "luck"], 2, "magnitude"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--quiet", *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert line in printed.err
    assert printed.err.count("\n") == 1
