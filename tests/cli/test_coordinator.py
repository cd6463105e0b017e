"""`reft-edge coordinator` as a new user meets it: what is wrong is one line, and `--check` says what is right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reft_edge.cli.main import main

SETTINGS = """
federation = "trial"
[broker]
port = 9
connect_timeout_s = 0.5
[model]
name = "mlp"
input_shape = [6]
n_outputs = 3
[planning]
ratios = [0.0, 0.5]
[data]
public = { path = "public.npz", labelled = false }
test = { path = "test.npz" }
"""

MODEL = """
import torch
from torch import nn

class Spectrum(nn.Module):
    def forward(self, inputs):
        return torch.fft.fft(inputs).real

def build():
    return nn.Sequential(nn.Linear(6, 3), Spectrum())

def linear():
    return nn.Linear(6, 3)

def wide():
    return nn.Linear(6, 4)

def broken():
    raise RuntimeError("no weights\\nfile")
"""


@pytest.fixture
def settings(tmp_path):
    for name in ("public", "test"):
        np.savez(tmp_path / f"{name}.npz", inputs=np.zeros((9, 6), np.float32), targets=np.arange(9) % 3)
    (tmp_path / "odd.py").write_text(MODEL)
    path = tmp_path / "federation.toml"
    path.write_text(SETTINGS)
    return path


BAD = {
    "misspelt key": ("n_outputs", "n_output", 2, "unknown key 'n_output'; did you mean 'n_outputs'"),
    "unknown policy": ("ratios =", 'policy = "fair"\nratios =', 2, "unknown policy 'fair'"),
    "unknown importance": ("ratios =", 'importance = "luck"\nratios =', 2, "'luck'"),
    "unknown model": ('"mlp"', '"mlpp"', 4, "did you mean 'mlp'"),
    "missing model file": ('"mlp"', '"nofile:build"', 4, "no file"),
    "a model that cannot be compiled": ('"mlp"', '"odd:build"', 4, "fft"),
    "missing data": ("test.npz", "tests.npz", 3, "tests.npz does not exist"),
    "data of another shape": ("input_shape = [6]", "input_shape = [7]", 3, "7"),
    "labels beyond the outputs": ("n_outputs = 3", "n_outputs = 2", 3, "class 2"),
    "a model with other outputs": ('"mlp"', '"odd:wide"', 4, "outputs of shape (4,)"),
    "an error of several lines": ('"mlp"', '"odd:broken"', 4, "no weights file"),
    "a port in the host": ("port = 9", 'host = "localhost:1883"', 2, "port = 1883"),
    "a missing key": ('federation = "trial"', "", 2, "lacks the key 'federation'"),
    "a missing key in a table": ("input_shape = [6]", "", 2, "[model] lacks the key 'input_shape'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line_and_an_exit_code(settings, capsys, name):
    before, after, code, message = BAD[name]
    settings.write_text(SETTINGS.replace(before, after, 1))
    assert main(["coordinator", str(settings), "--check", "--quiet"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("reft-edge coordinator: error: ")
    assert message in line


def test_a_wrong_broker_address_is_one_line(settings, capsys, monkeypatch):
    monkeypatch.setattr("reft_edge.coordinator.server.CONNECT_TIMEOUT_S", 0.5)
    assert main(["coordinator", str(settings), "--quiet", "--events"]) == 7
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("reft-edge coordinator: error: ")
    assert "localhost:9" in captured.err


def test_a_run_does_not_go_on_with_another_model(settings, capsys, monkeypatch):
    monkeypatch.setattr("reft_edge.coordinator.server.CONNECT_TIMEOUT_S", 0.2)
    model = settings.parent / "net.py"
    settings.write_text(SETTINGS.replace('"mlp"', '"net:build"', 1))
    for width, code in ((8, 7), (8, 7), (9, 2)):
        model.write_text(
            "from torch import nn\n"
            f"def build(): return nn.Sequential(nn.Linear(6, {width}), nn.ReLU(), nn.Linear({width}, 3))\n"
        )
        assert main(["coordinator", str(settings), "--quiet", "--events"]) == code
    assert "was begun with another model" in capsys.readouterr().err.splitlines()[-1]


def test_check_tells_what_devices_would_train(settings, capsys):
    profiles = settings.parent / "board.toml"
    names = ("cores", "clock_hz", "flops_per_cycle", "training_flops_per_s", "memory_total_bytes")
    lines = [f'{name} = {{ value = {10**9}, basis = "specified" }}' for name in names]
    profiles.write_text("\n".join(['name = "board"', *lines]))
    assert main(["coordinator", str(settings), "--check", "--json", "--quiet", "--profile", str(profiles)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["public_samples"], report["test_samples"]) == (9, 9)
    (device,) = report["devices"]
    assert device["option"]["ratio"] in (0.0, 0.5)
    assert not (settings.parent / "federation").exists(), "a check leaves nothing behind"


@pytest.mark.parametrize("arguments", [["--json", "--events"], ["--profile", "x.toml"]])
def test_arguments_that_contradict_each_other(settings, capsys, arguments):
    assert main(["coordinator", str(settings), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_that_cannot_be_pruned_may_be_trained_whole(settings, capsys):
    settings.write_text(SETTINGS.replace('"mlp"', '"odd:linear"', 1))
    assert main(["coordinator", str(settings), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "variants that compile: 1\ndevices train the whole model or nothing: ratio 0.5: " in printed
