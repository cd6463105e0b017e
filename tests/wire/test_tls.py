"""TLS with client certificates against a real Mosquitto; certificates are made on the fly."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reft_edge.errors import ConfigError
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.wire.connection_errors import BrokerConnectionError
from reft_edge.wire.mqtt import BrokerSettings, Connected, Event, MqttLink, Received, TurnedAway
from tests.certificates import DAY, Authority, free_port, tls_broker
from tests.refusals import refusal

pytestmark = pytest.mark.mosquitto

WAIT_S = 20.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of every kind."""
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory, "ca")
    authority.issue_server()
    authority.issue_server("old-server", ends=-DAY / 2)
    authority.issue_server("early-server", starts=DAY / 2)
    authority.issue("device")
    authority.issue("expired", ends=-DAY / 2)
    authority.issue("early", starts=DAY / 2)
    authority.issue("not-a-client", client=False)
    authority.revoke(ends=timedelta(seconds=-1)).rename(directory / "old.crl")
    authority.revoke(authority.issue("revoked"))
    Authority(directory, "other").issue("foreign")
    return directory


@pytest.fixture(scope="module")
def start(directory: Path, mosquitto_program: str) -> Iterator[Callable[..., BrokerSettings]]:
    """Starts a broker that demands certificates (one of each kind); returns a device's settings for it."""
    ports: dict[tuple[str, str], int] = {}
    with ExitStack() as brokers:

        def start(server: str = "server", revoked: str = "ca.crl") -> BrokerSettings:
            kind = (server, revoked)
            if kind not in ports:
                broker = tls_broker(mosquitto_program, directory, server=server, revoked=revoked)
                ports[kind] = brokers.enter_context(broker)
            return BrokerSettings(
                port=ports[kind],
                ca_file="ca.crt",
                certificate_file="device.crt",
                key_file="device.key",
                connect_timeout_s=2.0,
            ).resolved_in(directory)

        yield start


@pytest.fixture(scope="module")
def tls(start: Callable[..., BrokerSettings]) -> BrokerSettings:
    """Settings of a device with a certificate, for a broker that demands one."""
    return start()


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
    ("name", "words", "permanent"),
    [
        ("foreign", "does not know the authority that signed our certificate", True),
        ("revoked", "says that our certificate is revoked", True),
        ("not-a-client", "does not accept our certificate, which is not for clients", True),
        # The rest may be the clock's fault, and clocks are set right after a while.
        ("expired", "says that our certificate has expired", False),
        ("early", "does not accept our certificate; perhaps it is not valid yet", False),
    ],
)
def test_why_the_broker_turns_a_certificate_away_is_one_clear_line(
    tls: BrokerSettings, directory: Path, name: str, words: str, permanent: bool
) -> None:
    files = {"certificate_file": str(directory / f"{name}.crt"), "key_file": str(directory / f"{name}.key")}
    failure = refusal(msgspec.structs.replace(tls, **files))
    assert words in str(failure)
    assert (failure.permanent, failure.turned_away) == (permanent, True)


def test_a_broker_that_was_away_and_then_turns_us_away_is_told_and_logged(
    directory: Path, mosquitto_program: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    settings = BrokerSettings(
        port=port, ca_file="ca.crt", certificate_file="revoked.crt", key_file="revoked.key"
    ).resolved_in(directory)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    link = MqttLink(settings, client_id="revoked", events=events)
    link.start()
    try:
        with tls_broker(mosquitto_program, directory, port=port):
            event = events.get(timeout=WAIT_S)
    finally:
        link.stop()
    words = f"broker localhost:{port} says that our certificate is revoked"
    assert event == TurnedAway(reason=words)
    assert f"{words}; trying again" in caplog.messages


@pytest.mark.parametrize(
    ("changes", "words", "permanent"),
    [
        ({"ca_file": "other.crt"}, "was not signed by the authority in ca_file '.*other.crt'", True),
        ({"host": "127.0.0.1"}, "it is not for the host name '127.0.0.1'", True),
        ({"certificate_file": None, "key_file": None}, "wants a client certificate; set certificate_file", True),
        ({"certificate_file": None, "key_file": None, "ca_file": None}, "whether the broker wants TLS", False),
    ],
    ids=["wrong authority", "wrong host name", "no client certificate", "no TLS"],
)
def test_what_is_wrong_with_our_settings_is_one_clear_line(
    tls: BrokerSettings, directory: Path, changes: dict[str, Any], words: str, permanent: bool
) -> None:
    failure = refusal(msgspec.structs.replace(tls, **changes).resolved_in(directory))
    assert failure.permanent is permanent
    with pytest.raises(BrokerConnectionError, match=words):
        raise failure


@pytest.mark.parametrize(
    ("server", "revoked", "words"),
    [
        ("old-server", "ca.crl", "has expired by the clock here, which says"),
        ("early-server", "ca.crl", "is not valid yet by the clock here, which says"),
        ("server", "old.crl", "has expired, or its own revocation list has"),
    ],
    ids=["expired broker", "broker of tomorrow", "expired revocation list"],
)
def test_what_time_may_heal_is_tried_again(
    start: Callable[..., BrokerSettings], server: str, revoked: str, words: str
) -> None:
    failure = refusal(start(server, revoked))
    assert words in str(failure)
    assert not failure.permanent


def test_a_broker_that_dies_in_the_handshake_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=hang_up_on_all, args=(server,))
        thread.start()
        try:
            failure = refusal(BrokerSettings(port=server.getsockname()[1], tls=True))
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(WAIT_S)
    assert "broke off the TLS handshake" in str(failure)
    assert not failure.permanent


def hang_up_on_all(server: socket.socket) -> None:
    """Read the beginning of what each client says, then close; until the server is shut down."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.close()


def test_tls_to_a_port_without_it_is_one_clear_line(tls: BrokerSettings, broker: RunningBroker) -> None:
    settings = msgspec.structs.replace(tls, port=broker.port, connect_timeout_s=0.3)
    failure = refusal(settings)
    assert "is this its TLS port" in str(failure)
    assert not failure.permanent


def test_a_key_of_another_certificate_is_one_clear_line(tls: BrokerSettings, directory: Path) -> None:
    settings = msgspec.structs.replace(tls, key_file=str(directory / "revoked.key"))
    link = MqttLink(settings, client_id="device", events=queue.SimpleQueue())
    with pytest.raises(ConfigError, match=r"revoked\.key' cannot be used: key values mismatch$"):
        link.start(wait_s=WAIT_S)
