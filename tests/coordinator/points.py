"""A federation whose data are three clusters of points: settings and files that tests of the coordinator share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reft_edge.data.dataset import Dataset
from reft_edge.simulation.brokers import RunningBroker, find_mosquitto
from reft_edge.wire.endpoint import BrokerSettings

ONE_KIND = pytest.mark.parametrize("own_broker", ["mosquitto" if find_mosquitto() else "embedded"], indirect=True)
"""One kind of broker is enough for most tests; `tests/test_federation.py` runs on both."""

CENTRES = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32) * 2

SETTINGS = """
federation = "{federation}"
rounds = {rounds}
deadline_s = {deadline_s}
grace_s = 5
quorum = {quorum}
min_devices = {n_devices}
enrol_wait_s = {enrol_wait_s}
settle_s = 0
{extra}
[broker]
host = "{broker.host}"
port = {broker.port}
mqtt_version = "{broker.mqtt_version}"
[model]
name = "mlp"
input_shape = [6]
n_outputs = 3
[training]
local_epochs = 2
batch_size = 16
learning_rate = 0.1
[planning]
ratios = {ratios}
{planning}
[data]
public = {{ path = "public.npz", labelled = false }}
test = {{ path = "test.npz" }}
[distillation]
epochs = {epochs}
"""


def points(n: int, seed: int) -> Dataset:
    """Three clusters in six dimensions, by class."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, n)
    inputs = (CENTRES[targets] + rng.normal(size=(n, 6))).astype(np.float32)
    return Dataset(inputs=inputs, targets=targets.astype(np.int64))


def address(broker: RunningBroker) -> BrokerSettings:
    """Without trying MQTT 5 on the embedded broker, which takes two seconds to refuse it."""
    version = "3.1.1" if broker.kind == "embedded" else "auto"
    return BrokerSettings(host=broker.host, port=broker.port, mqtt_version=version)


def write_federation(
    directory: Path,
    broker: RunningBroker,
    federation: str,
    n_devices: int,
    *,
    rounds: int = 2,
    deadline_s: float = 30,
    enrol_wait_s: float = 30,
    quorum: float = 0.3,
    ratios: tuple[float, ...] = (0.0, 0.5),
    epochs: int = 2,
    extra: str = "",
    planning: str = "",
) -> Path:
    """Write federation.toml, public and test data; returns the path. `extra`: more lines of the first table."""
    for name, seed in (("public", 1), ("test", 2)):
        data = points(120, seed)
        np.savez(directory / f"{name}.npz", inputs=data.inputs, targets=data.targets)
    path = directory / "federation.toml"
    text = SETTINGS.format(
        federation=federation,
        rounds=rounds,
        deadline_s=deadline_s,
        quorum=quorum,
        n_devices=n_devices,
        enrol_wait_s=enrol_wait_s,
        extra=extra,
        broker=address(broker),
        ratios=list(ratios),
        planning=planning,
        epochs=epochs,
    )
    path.write_text(text)
    return path
