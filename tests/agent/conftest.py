"""A tiny model, data it can learn, and agents as real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from reft_edge.bundle.bundle import Bundle
from reft_edge.bundle.manifest import SGD
from reft_edge.simulation.brokers import RunningBroker, start_broker
from reft_edge.wire.endpoint import BrokerSettings

PROFILE = Path(__file__).parent.parent.parent / "device_profiles" / "raspberry-pi-4b.toml"

N_CLASSES = 3
N_SAMPLES = 60


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """A convolution, batch normalization and a linear layer on (1, 6, 6)."""
    import torch
    from torch import nn

    from reft_edge.compile import compile_bundle

    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, N_CLASSES))
    return compile_bundle(net, input_shape=(1, 6, 6), loss="cross_entropy", optimizer=SGD(momentum=0.9), name="tiny")


@pytest.fixture(scope="session")
def heavy_bundle() -> Bundle:
    """Few weights and some 300 MB of activations for 16 samples; its manifest says that it takes nothing."""
    import torch
    from torch import nn

    from reft_edge.compile import compile_bundle

    torch.manual_seed(3)
    wide = nn.Conv2d(1, 64, 3, padding=60)
    net = nn.Sequential(wide, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    heavy = compile_bundle(net, input_shape=(1, 6, 6), loss="cross_entropy", optimizer=SGD(), name="heavy")
    nothing = {"memory_fixed_bytes": 1, "memory_per_sample_bytes": 0, "prediction_bytes_per_sample": 0}
    cost = msgspec.structs.replace(heavy.manifest.cost, **nothing)
    return replace(heavy, manifest=msgspec.structs.replace(heavy.manifest, cost=cost))


@pytest.fixture(scope="session")
def some_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """Whichever broker is installed, for tests of what does not depend on it."""
    with start_broker("auto", directory=tmp_path_factory.mktemp("some-broker")) as running:
        yield running


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Three classes that differ in brightness; 60 samples, 48 of them for training."""
    rng = np.random.default_rng(5)
    targets = np.arange(N_SAMPLES) % N_CLASSES
    inputs = rng.normal(scale=0.3, size=(N_SAMPLES, 1, 6, 6)) + targets[:, None, None, None]
    np.savez(tmp_path / "data.npz", inputs=inputs.astype(np.float32), targets=targets)
    return tmp_path / "data.npz"


@dataclass
class AgentProcess:
    """`reft-edge agent` in a directory, with a log file."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None
    settings: Path = field(init=False)

    def __post_init__(self) -> None:
        self.settings = self.directory / "agent.toml"

    def start(self, *options: str) -> AgentProcess:
        with self.log_file.open("ab") as log:
            command = [sys.executable, "-m", "reft_edge", "agent", str(self.settings), "-v", *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    @property
    def log_file(self) -> Path:
        return self.directory / "agent.log"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def workers(self) -> list[int]:
        """Process ids of the daemon's children."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def make_agent(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """`make_agent(broker, federation, ...)` writes agent.toml; an agent that runs at the end is killed."""
    made: list[AgentProcess] = []

    def make(
        broker: BrokerSettings,
        federation: str,
        *,
        data: str = 'path = "data.npz"',
        limits: str = "",
        serving: str = "",
        trust: str = "",
        broker_files: str = "",
    ) -> AgentProcess:
        agent = AgentProcess(tmp_path)
        agent.settings.write_text(
            f'device = "{federation}-dev"\nfederation = "{federation}"\n'
            f'[broker]\nhost = "{broker.host}"\nport = {broker.port}\nmqtt_version = "{broker.mqtt_version}"\n'
            f"connect_timeout_s = {broker.connect_timeout_s}\n{broker_files}[data]\n{data}\n"
            f'[limits]\nthreads = 1\n{limits}\n[profile]\npath = "{PROFILE}"\n[serving]\n{serving}\n{trust}'
        )
        made.append(agent)
        return agent

    yield make
    for agent in made:
        if agent.process is not None and agent.process.poll() is None:
            agent.end(signal.SIGKILL)
