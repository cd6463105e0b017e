"""A federation's keys on this machine are a real federation's: what is installed works, and nothing else gets in."""

from __future__ import annotations

import queue
import socket
import stat
from pathlib import Path

import msgspec
import pytest
import tomli_w

from reft_edge.agent.settings import AgentSettings
from reft_edge.errors import ConfigError
from reft_edge.simulation.brokers import BrokerKind
from reft_edge.simulation.trust import start_trusted_broker, trust_at
from reft_edge.wire.mqtt import BrokerSettings, Event, MqttLink
from tests.conftest import BROKER_KINDS
from tests.refusals import refusal

ACCEPTED_WITHIN_S = 20.0


def connect(settings: BrokerSettings) -> None:
    """Log in and out again."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    link = MqttLink(settings, client_id="pi", events=events, persistent=False)
    link.start(wait_s=ACCEPTED_WITHIN_S)
    link.stop()


def enrolled(table: dict[str, object], directory: Path) -> AgentSettings:
    """agent.toml as a person completes it."""
    (directory / "agent.toml").write_text(tomli_w.dumps(table))
    return AgentSettings.read(directory / "agent.toml")


@pytest.mark.parametrize("kind", BROKER_KINDS)
def test_an_enrolled_device_gets_in_and_no_copy_of_its_key_is_left(
    kind: BrokerKind, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "mosquitto":
        request.getfixturevalue("mosquitto_program")
    with start_trusted_broker(kind, directory=tmp_path, federation="f") as trusted:
        settings = enrolled(trusted.enrol("pi", tmp_path / "pi"), tmp_path / "pi")
        assert (settings.device, settings.federation) == ("pi", "f")
        coordinator_uses_tls = "certificate_file" in trusted.coordinator_tables()["broker"]
        assert trusted.mutual_tls == settings.broker.uses_tls == coordinator_uses_tls == (kind == "mosquitto")
        connect(settings.broker)
    assert settings.trust
    key = Path(settings.trust.key_file)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert [path for path in tmp_path.rglob("*") if path.is_file() and key.read_bytes() in path.read_bytes()] == [key]


@pytest.mark.mosquitto
@pytest.mark.usefixtures("mosquitto_program")
def test_without_a_certificate_or_from_elsewhere_nobody_gets_in(tmp_path: Path) -> None:
    with start_trusted_broker("mosquitto", directory=tmp_path, federation="f") as trusted:
        broker = enrolled(trusted.enrol("pi", tmp_path / "pi"), tmp_path / "pi").broker
        nameless = msgspec.structs.replace(broker, certificate_file=None, key_file=None)
        assert "wants a client certificate" in str(refusal(nameless))
        assert "without an MQTT answer" in str(refusal(msgspec.structs.replace(nameless, ca_file=None)))
        with pytest.raises(OSError, match=r"refused|timed out"):  # it listens at 127.0.0.1 only
            socket.create_connection(("127.0.0.2", broker.port), timeout=ACCEPTED_WITHIN_S)


def test_an_address_that_no_certificate_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"broker's address.*'localhost\.'"):
        trust_at(BrokerSettings(host="localhost."), directory=tmp_path, federation="f")
    assert not list(tmp_path.iterdir())
