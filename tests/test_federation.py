"""The whole loop with real processes: broker, coordinator and agents started as a person starts them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from reft_edge.simulation.brokers import RunningBroker

ROOT = Path(__file__).resolve().parents[1]
CENTRES = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32) * 2

PROFILE = """
name = "fast-board"
{quantities}
"""

FEDERATION = """
federation = "{federation}"
rounds = 2
deadline_s = 60
min_devices = 3
[broker]
host = "{broker.host}"
port = {broker.port}
mqtt_version = "{version}"
[model]
name = "mymodel:build"
input_shape = [6]
classes = ["low", "middle", "high"]
[training]
local_epochs = 3
batch_size = 16
[planning]
ratios = [0.0, 0.5]
[data]
public = {{ path = "public.npz", labelled = false }}
test = {{ path = "test.npz", classes = ["low", "middle", "high"] }}
[distillation]
epochs = 2
"""

MODEL = """
from torch import nn

def build(n_outputs):
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, n_outputs))
"""

AGENT = """
device = "{device}"
federation = "{federation}"
spool = "spool-{device}"
[broker]
host = "{broker.host}"
port = {broker.port}
mqtt_version = "{version}"
[data]
path = "{device}.npz"
classes = ["low", "middle", "high"]
[limits]
threads = 1
{limits}
[profile]
path = "board.toml"
"""


def save_points(path: Path, n: int, seed: int) -> None:
    """Three clusters in six dimensions, by class."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, n)
    np.savez(path, inputs=(CENTRES[targets] + rng.normal(size=(n, 6))).astype(np.float32), targets=targets)


class Processes:
    """Children that end with the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self.directory / f"log-{len(self._started)}-{arguments[0]}.txt").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "reft_edge", *arguments],
                cwd=self.directory,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._started.append(child)
        return child

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("log-*"))

    def end(self) -> None:
        for child in self._started:
            child.send_signal(signal.SIGTERM)
        for child in self._started:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout:
                child.stdout.close()


@pytest.fixture
def site(tmp_path: Path, broker: RunningBroker, federation: str) -> Iterator[Processes]:
    """A folder with a federation's settings and data, three agents running in it; the coordinator is to be started."""
    version = "3.1.1" if broker.kind == "embedded" else "auto"
    (tmp_path / "federation.toml").write_text(FEDERATION.format(federation=federation, broker=broker, version=version))
    (tmp_path / "mymodel.py").write_text(MODEL)
    names = ("cores", "clock_hz", "flops_per_cycle", "training_flops_per_s", "memory_total_bytes", "worker_start_s")
    values = (4, 1e9, 8, 1e12, 4e9, 1)
    (tmp_path / "board.toml").write_text(
        PROFILE.format(
            quantities="\n".join(
                f'{name} = {{ value = {value}, basis = "specified" }}'
                for name, value in zip(names, values, strict=True)
            )
        )
    )
    save_points(tmp_path / "public.npz", 150, 1)
    save_points(tmp_path / "test.npz", 150, 2)
    processes = Processes(tmp_path)
    # The third is slow: it is still training when the others have sent their updates.
    for index, limits in enumerate(("", "", "training_flops_per_s = 4e5")):
        device = f"board-{index}-{federation}"
        save_points(tmp_path / f"{device}.npz", 100, 10 + index)
        text = AGENT.format(device=device, federation=federation, broker=broker, limits=limits, version=version)
        (tmp_path / f"agent-{index}.toml").write_text(text)
        processes.start("agent", f"agent-{index}.toml", "--log-format", "json")
    yield processes
    processes.end()


def read_until(coordinator: subprocess.Popen[bytes], kind: str, processes: Processes) -> list[dict]:
    """The coordinator's events up to the first of `kind`."""
    assert coordinator.stdout
    events = []
    for line in coordinator.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == kind:
            return events
    pytest.fail(f"the coordinator ended before {kind!r}\n{processes.logs()}")


def check_result(site: Processes, last: dict) -> None:
    """Six updates, each merged once; a model that works outside of this project; a report."""
    assert last["updates"] == {"merged": 6}
    assert last["accuracy"] > 0.9
    with sqlite3.connect(site.directory / "federation" / "coordinator.sqlite") as database:
        rows = database.execute("select round, device, count(*) from updates group by round, device").fetchall()
    assert sorted(count for _, _, count in rows) == [1] * 6
    directory = Path(last["directory"])
    session = onnxruntime.InferenceSession(directory / "models" / "global.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"inputs": CENTRES})
    assert outputs.argmax(axis=1).tolist() == [0, 1, 2]
    report = json.loads((directory / "report.json").read_text())
    assert len(report["rounds"]) == 2
    assert report["finished"]


def check_logs(site: Processes) -> None:
    """Every line of coordinator and agents is one object, and says what it is about."""
    lines = {
        path: [json.loads(line) for line in path.read_text().splitlines()] for path in site.directory.glob("log-*")
    }
    agents = [told for path, told in lines.items() if path.name.endswith("-agent.txt")]
    assert len({line["device"] for told in agents for line in told}) == 3
    for told in agents:
        assert len({line["device"] for line in told}) == 1
        assert [line["round"] for line in told if line["message"].startswith("training: task")] == [1, 2]
        assert all(line["task"] in line["message"] for line in told if line["message"].startswith("training: task"))
    ((coordinator, told),) = [(path, told) for path, told in lines.items() if "coordinator" in path.name]
    updates = [line for line in told if "update of" in line["message"]]
    assert len({(line["device"], line["round"]) for line in updates}) == 6, coordinator.read_text()


@pytest.mark.timeout(180)
def test_three_agents_train_one_model(site: Processes) -> None:
    """With all that one may ask for beside that: JSON logs and TensorBoard's curves."""
    options = ("--json", "--log-format", "json", "--tensorboard", "curves")
    coordinator = site.start("coordinator", "federation.toml", *options)
    summary = json.loads(coordinator.communicate(timeout=150)[0])
    assert coordinator.returncode == 0
    last = json.loads((Path(summary["directory"]) / "events.jsonl").read_text().splitlines()[-1])
    check_result(site, last)
    site.end()
    check_logs(site)
    (curves,) = (site.directory / "curves" / last["run"]).iterdir()
    assert b"accuracy/round" in curves.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("broker", ["embedded"], indirect=True)  # with Mosquitto: tests/test_faults.py
def test_a_coordinator_that_is_killed_and_stopped_goes_on_and_counts_each_update_once(site: Processes) -> None:
    first = site.start("coordinator", "federation.toml", "--events")
    read_until(first, "update", site)
    first.send_signal(signal.SIGKILL)
    first.wait()

    second = site.start("coordinator", "federation.toml", "--events")
    events = read_until(second, "round_closed", site)
    assert (events[0]["event"], events[0]["resumed"]) == ("started", True)
    second.send_signal(signal.SIGINT)
    assert second.wait(30) == 130
    assert "To go on: reft-edge coordinator federation.toml" in site.logs()

    third = site.start("coordinator", "federation.toml", "--events")
    *_, last = read_until(third, "finished", site)
    check_result(site, last)
    assert third.wait(30) == 0
