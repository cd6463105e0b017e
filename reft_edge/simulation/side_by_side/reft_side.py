"""Our side: Mosquitto and the coordinator in the hub, an agent on each device, provisioned as a fleet would be.

What is not said here is the product's default. There are no public data, so nothing is distilled: all that is not held
out is the devices', as on the other side.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from reft_edge.coordinator.events import Planned, RoundClosed, RoundStarted
from reft_edge.coordinator.settings import load_federation
from reft_edge.errors import BrokerError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.simulation.brokers import find_mosquitto
from reft_edge.simulation.children import Child, Children
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, write_part
from reft_edge.simulation.fleet import follow
from reft_edge.simulation.run_directory import FEDERATION_FILE, DemoOptions, find_board
from reft_edge.simulation.side_by_side import sides
from reft_edge.simulation.side_by_side.star import HUB_ADDRESS, Star
from reft_edge.simulation.side_by_side.task import NET, NET_FILE, TaskData, TaskSettings
from reft_edge.simulation.trust import PROVISIONING, TrustedBroker
from reft_edge.wire.codec_names import codec_text
from reft_edge.wire.endpoint import PLAIN_PORT, TLS_PORT, BrokerSettings

FEDERATION = "side-by-side"

STRONG_BOARD = "raspberry-pi-5"
"""What every device says it is, where nothing is planned."""

GRANTED_SHARE = 0.1
"""Of its speed that an emulated board grants to training; the rest is its main job's. The net is so small that boards
at full speed would differ by tenths of a second."""

UNPLANNED_DEADLINE_S = 600.0

TEST_FILE = "test.npz"

PROFILE_FILE = "profile.toml"
"""What this machine can do, measured once for all emulated boards."""

_ANNOUNCED = "samples to train on"
"""Stands in an agent's log when it knows what it can announce."""

_OPEN_BROKER = """\
listener {port}
allow_anonymous true
persistence false
connection_messages false
set_tcp_nodelay true
max_packet_size 131072
max_inflight_messages 8
"""
"""Mosquitto for everybody, with the limits of the fleet's configuration that change what travels."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a form means for the settings files."""

    boards: tuple[str, ...]
    emulated: bool
    """Agents have this machine's profile and train no faster, and with no more memory, than their boards grant; they
    pause for it, which takes wall time but no CPU time. Else every device is the board, and trains the unpruned net as
    fast as it can."""
    deadline_s: float


def _plan(n_devices: int, deadline_s: float | None) -> _Plan:
    if deadline_s is None:
        return _Plan(boards=(STRONG_BOARD,) * n_devices, emulated=False, deadline_s=UNPLANNED_DEADLINE_S)
    known = DemoOptions().boards
    boards = tuple(known[number % len(known)] for number in range(n_devices))
    return _Plan(boards=boards, emulated=True, deadline_s=deadline_s)


class ReftSide:
    """With a `deadline_s` devices are emulated boards, and the planner decides what each trains; without, all train the
    unpruned net."""

    def __init__(
        self,
        directory: Path,
        star: Star,
        children: Children,
        *,
        task: TaskSettings,
        data: TaskData,
        seed: int,
        secure: bool,
        deadline_s: float | None,
        codecs: Mapping[str, str],
    ) -> None:
        self._directory = directory
        self._star = star
        self._children = children
        self._task = task
        self._data = data
        self._seed = seed
        self._secure = secure
        self._codecs = codecs
        self._plan = _plan(len(data.devices), deadline_s)
        self._accuracies: list[float] = []
        self._planned: list[Planned] = []
        self._broker = BrokerSettings(host=HUB_ADDRESS, port=TLS_PORT if self._secure else PLAIN_PORT, mqtt_version="5")

    @property
    def security(self) -> str:
        return "mutual TLS, signed tasks and updates" if self._secure else "none"

    @property
    def versions(self) -> Mapping[str, str]:
        return {name: version(name) for name in ("reft-edge", "onnxruntime", "numpy", "paho-mqtt")}

    @property
    def details(self) -> Mapping[str, str]:
        training = load_federation(self._directory / FEDERATION_FILE).training
        shares = (
            " ".join(f"{device.share:.2g}" for device in sorted(planned.devices, key=lambda each: each.device))
            for planned in self._planned
        )
        return {
            "weights": codec_text(training.weights_encoding),
            "weights from the second round on": (
                "the same" if training.delta_encoding is None else f"change as {codec_text(training.delta_encoding)}"
            ),
            "updates": codec_text(training.update_encoding),
            "shares of the parameters, by round": "; ".join(shares),
        }

    def accuracies(self) -> Sequence[float]:
        return self._accuracies

    def start_devices(self) -> Sequence[int]:
        settings, devices = self._write()
        if self._plan.emulated:
            self._measure_machine()
        program = find_mosquitto()
        if program is None:
            raise BrokerError("our side needs Mosquitto here (apt install mosquitto); the embedded broker has no TLS")
        self._start("broker", [program, "-c", str(settings)])
        sides.wait_until(
            lambda: self._star.listens(self._broker.port), "Mosquitto", self._children, timeout_s=sides.START_TIMEOUT_S
        )
        agents = [self._start_agent(number, folder) for number, folder in enumerate(devices)]
        for agent in agents:
            sides.wait_for_words(agent, _ANNOUNCED, self._children)
        return [agent.process.pid for agent in agents]

    def run(self) -> Iterator[int]:
        command = [sys.executable, "-m", "reft_edge", "coordinator", FEDERATION_FILE, "--events"]
        coordinator = self._start("coordinator", command, read_output=True)
        timeout_s = sides.START_TIMEOUT_S + self._task.rounds * sides.ROUND_TIMEOUT_S
        for event in follow(coordinator, children=self._children, timeout_s=timeout_s):
            match event:
                case Planned():
                    self._planned.append(event)
                case RoundStarted() if not self._accuracies:
                    yield 0
                case RoundClosed(accuracy=accuracy) if accuracy is not None:
                    self._accuracies.append(accuracy)
                    yield len(self._accuracies)

    def _measure_machine(self) -> None:
        """As an agent would at its first start, but once, and while nobody else computes."""
        words = ["profile-device", "--quick", "--threads", "1", "--output", PROFILE_FILE]
        measuring = self._start("profile-device", [sys.executable, "-m", "reft_edge", *words])
        sides.wait_until(
            lambda: measuring.status == 0, "profile-device", self._children, timeout_s=sides.START_TIMEOUT_S
        )

    def _write(self) -> tuple[Path, list[Path]]:
        """Everybody's files; returns the broker's configuration and the devices' folders."""
        directory = self._directory
        write_part(directory / TEST_FILE, self._data.test)
        shutil.copy(NET_FILE, directory / NET_FILE.name)
        trusted = self._found_authority() if self._secure else None
        met = {"federation": FEDERATION, "broker": self._broker_table()}
        tables = met if trusted is None else trusted.coordinator_tables()
        (directory / FEDERATION_FILE).write_text(tomli_w.dumps(self._federation_table(tables)), encoding="utf-8")
        folders = []
        for number, (board, part) in enumerate(zip(self._plan.boards, self._data.devices, strict=True)):
            folder = directory / f"device-{number}"
            write_part(folder / "data.npz", part)
            known = {**met, "device": folder.name} if trusted is None else trusted.enrol(folder.name, folder)
            (folder / "agent.toml").write_text(tomli_w.dumps(self._agent_table(known, board)), encoding="utf-8")
            folders.append(folder)
        if trusted is None:
            configuration = directory / "mosquitto.conf"
            configuration.write_text(_OPEN_BROKER.format(port=self._broker.port), encoding="utf-8")
        else:
            configuration = trusted.provisioned.broker_configuration
        with configuration.open("a", encoding="utf-8") as file:
            file.write(
                "user root\n"
            )  # only root may make namespaces; Mosquitto would step back to a user without rights
        return configuration, folders

    def _found_authority(self) -> TrustedBroker:
        provisioned = sides.found_authority(self._directory / PROVISIONING, FEDERATION, self._broker.port)
        return TrustedBroker(broker=self._broker, provisioned=provisioned, mutual_tls=True)

    def _federation_table(self, met: Mapping[str, Any]) -> dict[str, Any]:
        task, plan = self._task, self._plan
        return {
            **met,
            "rounds": task.rounds,
            "seed": self._seed,
            "deadline_s": plan.deadline_s,
            "grace_s": 60.0,
            "quorum": 1.0,
            "min_devices": len(self._data.devices),
            "settle_s": 0.0,
            "model": {
                "name": NET,
                "input_shape": list(INPUT_SHAPE),
                "n_outputs": N_CLASSES,
                "optimizer": {"name": "sgd", "momentum": task.momentum},
            },
            "training": {
                "local_epochs": task.local_epochs,
                "batch_size": task.batch_size,
                "learning_rate": task.learning_rate,
                **self._codecs,
            },
            "planning": {} if plan.emulated else {"ratios": [0.0]},
            "distillation": {"epochs": 0},
            "data": {"test": {"path": TEST_FILE}},
        }

    def _agent_table(self, known: Mapping[str, Any], board: str) -> dict[str, Any]:
        path = find_board(board)
        limits: dict[str, Any] = {"threads": 1}
        if self._plan.emulated:
            profile = DeviceProfile.read(path)
            limits["training_flops_per_s"] = GRANTED_SHARE * profile.planning_flops_per_s
            limits["memory_bytes"] = int(profile.planning_memory_bytes)
        return {
            **known,
            "data": {"path": "data.npz", "holdout_fraction": 0.0},
            "profile": {"path": str(self._directory / PROFILE_FILE if self._plan.emulated else path)},
            "limits": limits,
        }

    def _broker_table(self) -> dict[str, Any]:
        return {"host": self._broker.host, "port": self._broker.port, "mqtt_version": self._broker.mqtt_version}

    def _start_agent(self, number: int, folder: Path) -> Child:
        return sides.start_device(
            self._children,
            folder.name,
            [sys.executable, "-m", "reft_edge", "agent", "agent.toml"],
            within=lambda inner: self._star.at_device(number, inner),
            folder=folder,
        )

    def _start(self, name: str, command: Sequence[str], *, read_output: bool = False) -> Child:
        """A process in the hub."""
        return self._children.start(
            name,
            self._star.at_hub(command),
            log_path=self._directory / f"{name}.log",
            directory=self._directory,
            environment=sides.environment(),
            read_output=read_output,
        )
