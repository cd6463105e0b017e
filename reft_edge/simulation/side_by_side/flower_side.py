"""Flower's side: a SuperLink in the hub, a SuperNode on each device, and one run of the app in `flower_app`.

Everything is started as Flower's documentation says, each with what it starts itself. Two of its defaults are changed,
both in its favour: FedAvg does not evaluate on the devices, and nothing is reported or looked up outside (there is no
outside here). It runs without encryption, which is the cheapest way, or with TLS, by which devices know the server but
the server does not know the devices.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from reft_edge.errors import FederationError
from reft_edge.provisioning.directory import BROKER, Paths
from reft_edge.simulation.children import Child, Children
from reft_edge.simulation.digits import write_part
from reft_edge.simulation.side_by_side import sides
from reft_edge.simulation.side_by_side.flower_environment import packages
from reft_edge.simulation.side_by_side.star import HUB_ADDRESS, Star
from reft_edge.simulation.side_by_side.task import TaskData, TaskSettings, accuracy_of
from reft_edge.simulation.trust import PROVISIONING

PORT = 8000
"""Of the SuperLink, by default; the namespace is our own."""

NO_INSTALLATION = "--disable-runtime-dependency-installation"
"""The app needs nothing that is not there; looking for it would take time on the server."""

_APP_FILES = Path(__file__).parent / "flower_app"
_ANNOUNCED = "SuperNode ID"
"""Stands in a SuperNode's log when the SuperLink knows it."""


class FlowerSide:
    """`environment`: the folder that `flower_environment` made."""

    def __init__(
        self,
        directory: Path,
        star: Star,
        children: Children,
        *,
        task: TaskSettings,
        data: TaskData,
        seed: int,
        environment: Path,
        tls: bool = False,
    ) -> None:
        self._directory = directory
        self._star = star
        self._children = children
        self._task = task
        self._data = data
        self._seed = seed
        self._environment = environment
        self._output = directory / "output"
        self._tls = tls
        self._authority = directory / PROVISIONING

    @property
    def security(self) -> str:
        return "TLS with the server's certificate" if self._tls else "none (--insecure)"

    @property
    def versions(self) -> Mapping[str, str]:
        return packages(self._environment)

    @property
    def details(self) -> Mapping[str, str]:
        return {"strategy": "FedAvg(fraction_evaluate=0.0)", "tensors": "float32 both ways"}

    def start_devices(self) -> Sequence[int]:
        self._write_app()
        self._start("superlink", ["flower-superlink", *self._server_words(), "--host", HUB_ADDRESS, NO_INSTALLATION])
        sides.wait_until(
            lambda: self._star.listens(PORT), "the SuperLink", self._children, timeout_s=sides.START_TIMEOUT_S
        )
        nodes = [self._start_node(number) for number in range(len(self._data.devices))]
        for node in nodes:
            sides.wait_for_words(node, _ANNOUNCED, self._children)
        return [node.process.pid for node in nodes]

    def run(self) -> Iterator[int]:
        task = self._task
        config = {
            "rounds": task.rounds,
            "devices": len(self._data.devices),
            "local-epochs": task.local_epochs,
            "batch-size": task.batch_size,
            "learning-rate": task.learning_rate,
            "momentum": task.momentum,
            "seed": self._seed,
            "output": str(self._output),
        }
        words = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in config.items()
        )
        starter = self._start("run", ["flwr", "run", str(self._directory / "app"), "here", "--run-config", words])
        for number in range(task.rounds + 1):
            sides.wait_until(
                self._file(number).is_file, f"round {number}", self._children, timeout_s=sides.ROUND_TIMEOUT_S
            )
            yield number
        if starter.status != 0:
            raise FederationError(starter.obituary())

    def accuracies(self) -> list[float]:
        return [self._accuracy(number) for number in range(1, self._task.rounds + 1)]

    def _accuracy(self, number: int) -> float:
        with np.load(self._file(number)) as weights:
            return accuracy_of(dict(weights), self._data.test)

    def _file(self, number: int) -> Path:
        return self._output / f"round-{number}.npz"

    def _write_app(self) -> None:
        app = self._directory / "app"
        package = app / "digits_app"
        shutil.copytree(_APP_FILES, package, ignore=shutil.ignore_patterns("*.pyc", "__pycache__", "app.toml"))
        shutil.copy(_APP_FILES / "app.toml", app / "pyproject.toml")
        self._output.mkdir()
        for number, part in enumerate(self._data.devices):
            write_part(self._directory / f"device-{number}" / "data.npz", part)
        here: dict[str, Any] = {"address": f"{HUB_ADDRESS}:{PORT}"}
        here |= {"root-certificates": str(self._trusted())} if self._tls else {"insecure": True}
        connection = {"superlink": {"default": "here", "here": here}}
        home = self._home("run")
        home.mkdir(parents=True)
        (home / "config.toml").write_text(tomli_w.dumps(connection), encoding="utf-8")

    def _server_words(self) -> list[str]:
        if not self._tls:
            return ["--insecure"]
        paths = sides.found_authority(self._authority, "flower", PORT)
        files = {"ca-certfile": "ca.pem", "certfile": f"{BROKER}.pem", "keyfile": f"{BROKER}.key"}
        return [word for name, file in files.items() for word in (f"--ssl-{name}", str(paths.broker / file))]

    def _node_words(self) -> list[str]:
        return ["--root-certificates", str(self._trusted())] if self._tls else ["--insecure"]

    def _trusted(self) -> Path:
        return Paths(self._authority).broker / "ca.pem"

    def _start_node(self, number: int) -> Child:
        folder = self._directory / f"device-{number}"
        command = [
            str(self._program("flower-supernode")),
            *self._node_words(),
            "--superlink",
            f"{HUB_ADDRESS}:{PORT}",
            "--node-config",
            f'data="{folder / "data.npz"}"',
        ]
        return sides.start_device(
            self._children,
            f"device-{number}",
            ["env", *self._variables(f"device-{number}"), *command],
            within=lambda inner: self._star.at_device(number, inner),
            folder=folder,
        )

    def _start(self, name: str, command: Sequence[str]) -> Child:
        """A process in the hub."""
        program, *arguments = command
        return self._children.start(
            name,
            self._star.at_hub(["env", *self._variables(name), str(self._program(program)), *arguments]),
            log_path=self._directory / f"{name}.log",
            directory=self._directory,
            environment=sides.environment(),
        )

    def _variables(self, name: str) -> list[str]:
        """As `env` takes them. Programs start others by name, so they have to be on the PATH."""
        return [
            f"PATH={self._environment / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            f"FLWR_HOME={self._home(name)}",
            "FLWR_TELEMETRY_ENABLED=0",
            "FLWR_DISABLE_UPDATE_CHECK=1",
            "PYTHONPATH=",  # ours is not Flower's business
        ]

    def _home(self, name: str) -> Path:
        return self._directory / "homes" / name

    def _program(self, name: str) -> Path:
        return self._environment / "bin" / name
