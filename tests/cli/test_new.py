"""`reft-edge new`: what it writes runs at once, and is refused where it would overwrite something."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from reft_edge.cli.main import main
from reft_edge.data_files import shared_folder
from reft_edge.starter.project import BROKER_PORT
from reft_edge.starter.vibration import STATES, WINDOW, stretch


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "presses"
    assert main(["new", str(folder)]) == 0
    return folder


def test_the_coordinator_finds_everything_in_order(project, capsys):
    assert main(["coordinator", str(project / "federation.toml"), "--check", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "federation presses: model:build" in text
    assert "All right." in text


@pytest.mark.slow
def test_the_project_trains_a_model_at_once(project):
    settings = project / "federation.toml"
    settings.write_text(settings.read_text().replace("rounds = 5", "rounds = 1"))
    board = (
        shared_folder("device_profiles") / "raspberry-pi-5.toml"
    )  # measuring takes a while where tests run side by side
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    for file in (settings, project / "run", *project.glob("press-*.toml")):
        file.write_text(file.read_text().replace(str(BROKER_PORT), str(port)))  # another may run beside this test
    for agent in project.glob("press-*.toml"):
        agent.write_text(f'{agent.read_text()}\n[profile]\npath = "{board}"\n')
    # The command as it is installed beside the interpreter that runs the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([project / "run"], capture_output=True, text=True, env={**os.environ, "PATH": path})
    logs = {log.name: log.read_text() for log in (project / "logs").iterdir()}
    assert done.returncode == 0, (done.stderr, logs)
    assert "merged 3 updates" in done.stderr
    assert len(list(project.glob("results/*/models/global.onnx"))) == 1


def test_nothing_is_overwritten(project, capsys):
    before = sorted(project.rglob("*"))
    assert main(["new", str(project)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(project.rglob("*")) == before


def test_a_folder_whose_name_is_no_federation_needs_one(tmp_path, capsys):
    assert main(["new", str(tmp_path / "my project")]) == 2
    assert "--federation" in capsys.readouterr().err
    assert main(["new", str(tmp_path / "my project"), "--federation", "mine"]) == 0
    assert 'federation = "mine"' in (tmp_path / "my project" / "press-1.toml").read_text()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["new", str(tmp_path / "file" / "presses")]) == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


def test_public_recordings_have_no_labels_and_one_press_never_saw_a_broken_bearing(project):
    with (project / "data" / "public.csv").open() as file:
        assert next(csv.reader(file)) == ["acceleration_x", "acceleration_y", "acceleration_z"]
    with (project / "data" / "press-1.csv").open() as file:
        assert {row["state"] for row in csv.DictReader(file)} == {"good", "imbalance"}


def test_states_differ_more_than_noise_does():
    def spectra(state: str, seed: int) -> np.ndarray:
        windows = stretch(state, 100 * WINDOW, 0.0, np.random.default_rng(seed)).reshape(100, WINDOW, 3)
        return np.abs(np.fft.rfft(windows, axis=1)).mean(axis=0)

    for state in STATES:
        distances = {other: np.linalg.norm(spectra(other, 1) - spectra(state, 0)) for other in STATES}
        assert min(distances, key=distances.__getitem__) == state
