"""The shipped Mosquitto configuration starts a real Mosquitto, and lets each client do what it should and no more."""

from __future__ import annotations

import getpass
import queue
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from reft_edge.agent.link_probe import measure_link
from reft_edge.errors import BrokerError
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.mqtt import Connected, Event, MqttLink, Received, Rejected
from reft_edge.wire.topics import blob_topic, device_topic, probe_topics

pytestmark = pytest.mark.mosquitto

SHIPPED = Path(__file__).resolve().parents[1] / "broker_config"
FEDERATION = "f"
DEADLINE_S = 20.0


@pytest.fixture
def broker(tmp_path: Path, mosquitto_program: str) -> Iterator[BrokerSettings]:
    """Mosquitto with the shipped files; only paths, the port and the user it runs as are changed."""
    port = _free_port()
    _write_passwords(tmp_path, ["coordinator", "pi-01", "pi-02"])
    shutil.copy(SHIPPED / "reft-edge.acl", tmp_path)
    text = (SHIPPED / "mosquitto.conf").read_text()
    text = text.replace("/etc/mosquitto/", f"{tmp_path}/").replace("/var/lib/mosquitto/", f"{tmp_path}/")
    text, n_listeners = re.subn(r"(?m)^listener 1883$", f"listener {port} 127.0.0.1", text)
    assert n_listeners == 1
    (tmp_path / "mosquitto.conf").write_text(f"user {getpass.getuser()}\n{text}")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([mosquitto_program, "-c", str(tmp_path / "mosquitto.conf")], stdout=log, stderr=log)
    try:
        yield BrokerSettings(host="127.0.0.1", port=port)
    finally:
        process.terminate()
        process.wait(10)


class Client:
    """A logged-in link and what it receives."""

    def __init__(self, broker: BrokerSettings, name: str, directory: Path, topics: list[str]) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        settings = BrokerSettings(
            host=broker.host, port=broker.port, username=name, password_file=str(directory / f"{name}.password")
        )
        subscriptions = [(topic, 1) for topic in topics]
        self.link = MqttLink(settings, client_id=name, events=self.events, subscriptions=subscriptions)
        self.link.start(wait_s=DEADLINE_S)

    def next_message(self) -> Received:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(event, Received):
                return event
            assert isinstance(event, Connected | Rejected)


def test_a_device_is_heard_on_its_own_topics_only(broker: BrokerSettings, tmp_path: Path) -> None:
    everything = f"reft/v1/{FEDERATION}/#"
    coordinator = Client(broker, "coordinator", tmp_path, [everything])
    device = Client(broker, "pi-01", tmp_path, [])
    try:
        device.link.publish(device_topic(FEDERATION, "pi-02", "report"), b"forged")
        device.link.publish(device_topic(FEDERATION, "pi-01", "task"), b"forged")
        device.link.publish(blob_topic(FEDERATION, "0" * 16, 0), b"forged")
        device.link.publish(device_topic(FEDERATION, "pi-01", "report"), b"mine")
        assert coordinator.next_message().payload == b"mine"
    finally:
        device.link.stop()
        coordinator.link.stop()


def test_a_device_hears_its_own_tasks_and_the_shared_blobs_only(broker: BrokerSettings, tmp_path: Path) -> None:
    device = Client(broker, "pi-01", tmp_path, [f"reft/v1/{FEDERATION}/#"])
    coordinator = Client(broker, "coordinator", tmp_path, [])
    try:
        coordinator.link.publish(device_topic(FEDERATION, "pi-02", "task"), b"not for pi-01")
        coordinator.link.publish(device_topic(FEDERATION, "pi-01", "task"), b"for pi-01")
        coordinator.link.publish(blob_topic(FEDERATION, "0" * 16, 0), b"for all")
        assert [device.next_message().payload for _ in range(2)] == [b"for pi-01", b"for all"]
    finally:
        coordinator.link.stop()
        device.link.stop()


def test_a_device_measures_its_link_where_no_other_device_can_meddle(broker: BrokerSettings, tmp_path: Path) -> None:
    login = msgspec.structs.replace(broker, username="pi-01", password_file=str(tmp_path / "pi-01.password"))
    assert measure_link(login, budget_s=0.1).up_bytes_per_s > 0

    mine, theirs = probe_topics("pi-01", "pi-01"), probe_topics("pi-02", "pi-02")
    measuring = Client(broker, "pi-01", tmp_path, [f"{mine}/echo"])
    meddling = Client(broker, "pi-02", tmp_path, ["reft/probe/#"])
    try:
        meddling.link.publish(f"{mine}/echo", b"forged")
        meddling.link.publish(f"{theirs}/echo", b"first")
        assert meddling.next_message().payload == b"first"
        measuring.link.publish(f"{mine}/echo", b"mine")
        assert measuring.next_message().payload == b"mine"
        meddling.link.publish(f"{theirs}/echo", b"second")
        assert meddling.next_message().payload == b"second"
    finally:
        meddling.link.stop()
        measuring.link.stop()


def test_a_wrong_password_is_refused_in_one_line(broker: BrokerSettings, tmp_path: Path) -> None:
    (tmp_path / "pi-01.password").write_text("guessed\n")
    with pytest.raises(BrokerError, match=r"(?i)not authori[sz]ed|password"):
        Client(broker, "pi-01", tmp_path, [])


def _write_passwords(directory: Path, names: list[str]) -> None:
    tool = shutil.which("mosquitto_passwd", path="/usr/bin:/usr/local/bin")
    if tool is None:
        pytest.skip("mosquitto_passwd is not installed")
    passwords = directory / "reft-edge.passwords"
    passwords.touch(mode=0o600)
    for name in names:
        (directory / f"{name}.password").write_text(f"secret of {name}\n")
        subprocess.run([tool, "-b", str(passwords), name, f"secret of {name}"], check=True, capture_output=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
