"""Weights that travel as deltas, with real processes that are killed and lose what they had: only bytes change."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.simulation.brokers import find_mosquitto, start_broker
from tests.test_federation import AGENT, PROFILE, Processes, save_points

DEVICES = ("north", "east", "south")

FEDERATION = """
federation = "deltas"
rounds = 3
deadline_s = 100
absent_s = 100
quorum = 1.0
min_devices = 3
settle_s = 0
[broker]
host = "{broker.host}"
port = {broker.port}
mqtt_version = "{version}"
[model]
name = "mymodel:build"
input_shape = [6]
classes = ["low", "middle", "high"]
[training]
local_epochs = 1
batch_size = 16
update_codec = "float32"
[planning]
ratios = [0.0]
[data]
public = {{ path = "public.npz", labelled = false }}
test = {{ path = "test.npz", classes = ["low", "middle", "high"] }}
[distillation]
epochs = 1
"""
"""Exact updates: a device that loses its spool loses what quantization left of its last update, which would show."""


MODEL = """
from torch import nn

def build(n_outputs):
    return nn.Sequential(
        nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, n_outputs)
    )
"""


class Federation:
    """One run with a broker of its own. `disturb` hears every event of the coordinator, and may kill and start."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.processes = Processes(directory)
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.down: dict[int, dict[str, int]] = defaultdict(dict)
        """Round -> device -> bytes."""
        self.weights = ""

    def play(self, disturb: Callable[[Federation, dict], bool]) -> None:
        """To the end; `disturb` says whether the coordinator was killed."""
        with start_broker("auto", directory=self.directory / "broker") as broker:
            version = "3.1.1" if broker.kind == "embedded" else "auto"
            self._write(broker=broker, version=version)
            try:
                for device in DEVICES:
                    self.start(device)
                while not self._follow(disturb):
                    pass
            finally:
                self.processes.end()
        with sqlite3.connect(self.directory / "federation" / "coordinator.sqlite") as database:
            ((weights,),) = database.execute("select weights from runs").fetchall()
            assert database.execute("select count(*) from updates where state = 'merged'").fetchone() == (9,)
        self.weights = json.loads(weights)["sha256"]

    def start(self, device: str) -> None:
        self.agents[device] = self.processes.start("agent", f"{device}.toml")

    def kill(self, device: str) -> None:
        self.agents[device].send_signal(signal.SIGKILL)
        self.agents[device].wait()

    def _follow(self, disturb: Callable[[Federation, dict], bool]) -> bool:
        """One coordinator process; whether it came to the end."""
        coordinator = self.processes.start("coordinator", "federation.toml", "--events")
        assert coordinator.stdout
        for line in coordinator.stdout:
            event = json.loads(line)
            if event["event"] == "round_closed":
                self.down[event["round"]] = {item["device"]: item["down_bytes"] for item in event["traffic"]}
            if event["event"] == "finished":
                assert coordinator.wait(60) == 0
                return True
            if disturb(self, event):
                coordinator.send_signal(signal.SIGKILL)
                coordinator.wait()
                return False
        pytest.fail(f"the coordinator ended\n{self.processes.logs()}")

    def _write(self, **values: object) -> None:
        (self.directory / "federation.toml").write_text(FEDERATION.format(**values))
        (self.directory / "mymodel.py").write_text(MODEL)
        board = {"cores": 1, "clock_hz": 1e9, "flops_per_cycle": 8, "training_flops_per_s": 1e12,
                 "memory_total_bytes": 4e9, "worker_start_s": 1}  # fmt: skip
        quantities = "\n".join(f'{name} = {{ value = {value}, basis = "specified" }}' for name, value in board.items())
        (self.directory / "board.toml").write_text(PROFILE.format(quantities=quantities))
        save_points(self.directory / "public.npz", 90, 1)
        save_points(self.directory / "test.npz", 90, 2)
        for index, device in enumerate(DEVICES):
            save_points(self.directory / f"{device}.npz", 80, 10 + index)
            text = AGENT.format(device=device, federation="deltas", limits="", **values)
            (self.directory / f"{device}.toml").write_text(text)


def leave_alone(_federation: Federation, _event: dict) -> bool:
    return False


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.mosquitto
@pytest.mark.usefixtures("mosquitto_program")
def test_who_is_killed_or_loses_its_spool_changes_bytes_and_no_weights(tmp_path: Path) -> None:
    assert find_mosquitto()
    quiet = Federation(tmp_path / "quiet")
    quiet.play(leave_alone)
    for device in DEVICES:
        first, second, third = (quiet.down[number][device] for number in (1, 2, 3))
        assert 0 < max(second, third) < 0.6 * first

    moments = {("round_closed", 1), ("update", 2), ("round_started", 3)}

    def disturb(federation: Federation, event: dict) -> bool:
        moment = (event["event"], event.get("round", 0))
        if moment not in moments:
            return False
        moments.remove(moment)
        if moment[0] == "round_closed":  # one agent is killed between rounds, another loses all it had
            federation.kill("north")
            federation.kill("east")
            shutil.rmtree(federation.directory / "spool-east")
            federation.start("north")
            federation.start("east")
            return False
        return True

    troubled = Federation(tmp_path / "troubled")
    troubled.play(disturb)
    assert not moments
    assert troubled.weights == quiet.weights
    assert troubled.down[1] == quiet.down[1]
    assert {device: troubled.down[2][device] for device in ("north", "south")} == {
        device: quiet.down[2][device] for device in ("north", "south")
    }
    assert troubled.down[2]["east"] >= quiet.down[1]["east"]
    assert troubled.down[3] == quiet.down[3]
