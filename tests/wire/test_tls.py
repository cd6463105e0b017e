"""TLS with client certificates against a real Mosquitto; certificates are made on the fly."""

from __future__ import annotations

import getpass
import queue
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from reft_edge.errors import BrokerError
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.wire.mqtt import BrokerSettings, Connected, Event, MqttLink, Received
from tests.certificates import Authority

pytestmark = pytest.mark.mosquitto

WAIT_S = 20.0
CONFIGURATION = """\
user {user}
listener {port} 127.0.0.1
allow_anonymous true
cafile {directory}/ca.crt
certfile {directory}/server.crt
keyfile {directory}/server.key
require_certificate true
"""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory, mosquitto_program: str) -> Iterator[BrokerSettings]:
    """Settings of a device with a certificate, for a broker that demands one."""
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory, "ca")
    authority.issue_server()
    authority.issue("device")
    Authority(directory, "other")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = CONFIGURATION.format(user=getpass.getuser(), port=port, directory=directory)
    (directory / "mosquitto.conf").write_text(text)
    with subprocess.Popen(
        [mosquitto_program, "-c", str(directory / "mosquitto.conf")], stderr=subprocess.DEVNULL
    ) as broker:
        settings = BrokerSettings(
            port=port, ca_file="ca.crt", certificate_file="device.crt", key_file="device.key", connect_timeout_s=2.0
        ).resolved_in(directory)
        wait_until_up(settings)
        yield settings
        broker.terminate()


def wait_until_up(settings: BrokerSettings) -> None:
    probe = MqttLink(settings, client_id="probe", events=queue.SimpleQueue())
    probe.start(wait_s=WAIT_S)
    probe.stop()


def test_blocks_pass_through_tls_in_both_directions(tls: BrokerSettings) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    link = MqttLink(tls, client_id="device", events=events, subscriptions=[("t", 1)])
    link.start(wait_s=WAIT_S)
    try:
        assert isinstance(events.get(timeout=WAIT_S), Connected)
        for number in range(40):
            assert link.publish("t", bytes([number]) * 65_556, qos=number % 2)
        received = [events.get(timeout=WAIT_S) for _ in range(40)]
    finally:
        link.stop()
    payloads = {event.payload for event in received if isinstance(event, Received)}
    assert payloads == {bytes([number]) * 65_556 for number in range(40)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ca_file": "other.crt"}, "certificate is not accepted.*check ca_file"),
        ({"host": "127.0.0.1"}, "certificate is not accepted.*host name"),
        ({"certificate_file": None, "key_file": None}, "client certificate"),
        ({"certificate_file": None, "key_file": None, "ca_file": None}, "broker wants TLS"),
    ],
    ids=["wrong authority", "wrong host name", "no client certificate", "no TLS"],
)
def test_what_is_wrong_with_the_certificates_is_one_clear_line(
    tls: BrokerSettings, changes: dict[str, str | None], words: str
) -> None:
    if changes.get("ca_file"):
        changes = {**changes, "ca_file": str(Path(str(tls.ca_file)).with_name("other.crt"))}
    link = MqttLink(msgspec.structs.replace(tls, **changes), client_id="device", events=queue.SimpleQueue())
    with pytest.raises(BrokerError, match=words):
        link.start(wait_s=0.7)


def test_tls_to_a_port_without_it_is_one_clear_line(tls: BrokerSettings, broker: RunningBroker) -> None:
    settings = msgspec.structs.replace(tls, port=broker.port, connect_timeout_s=0.3)
    link = MqttLink(settings, client_id="x", events=queue.SimpleQueue())
    with pytest.raises(BrokerError, match="is this its TLS port"):
        link.start(wait_s=2.0)
