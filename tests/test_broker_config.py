"""A real Mosquitto as `reft-edge provision init` configures it: who gets in, what each may do, and who is put out."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import queue
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from cryptography import x509

from reft_edge.agent.link_probe import measure_link
from reft_edge.agent.settings import AgentSettings
from reft_edge.cli.main import main
from reft_edge.cli.profile_device import agent_login
from reft_edge.data.settings import DataSettings
from reft_edge.errors import BrokerError
from reft_edge.provisioning.authority import Authority, new_client_key, new_server_key, private_pem
from reft_edge.provisioning.directory import Provisioning
from reft_edge.wire.enrolment import decode_enrolment
from reft_edge.wire.mqtt import BrokerSettings, Disconnected, Event, MqttLink, Received, Rejected
from reft_edge.wire.topics import blob_topic, device_topic, probe_topics
from tests.refusals import refusal

pytestmark = pytest.mark.mosquitto

FEDERATION = "f"
EVERYTHING = f"reft/v1/{FEDERATION}/#"
DEADLINE_S = 20.0
REFUSED_WITHIN_S = 0.7
Kind = TypeVar("Kind")

DAY = timedelta(days=1)
YEAR = timedelta(days=365)


@dataclass(frozen=True, kw_only=True)
class Broker:
    """Mosquitto, running in the provisioning directory `root`."""

    root: Path
    port: int
    process: subprocess.Popen[bytes]

    def provision(self, action: str, *arguments: str) -> int:
        return main(["provision", action, "--directory", str(self.root), *arguments])

    @property
    def authority(self) -> Authority:
        return Provisioning.read(self.root).authority

    def settings(self, certificate: bytes, key: bytes, *, name: str = "tried") -> BrokerSettings:
        folder = self.root.parent
        (folder / f"{name}.pem").write_bytes(certificate)
        (folder / f"{name}.key").write_bytes(key)
        return BrokerSettings(
            host="127.0.0.1",
            port=self.port,
            ca_file=str(self.root / "authority" / "ca.pem"),
            certificate_file=str(folder / f"{name}.pem"),
            key_file=str(folder / f"{name}.key"),
            connect_timeout_s=5.0,
        )

    def device(self, name: str) -> BrokerSettings:
        """How the device `name` logs in with what its enrolment file holds."""
        enrolment = decode_enrolment((self.root / "devices" / f"{name}.enrol").read_bytes())
        assert (enrolment.device, enrolment.federation) == (name, FEDERATION)
        assert (enrolment.broker_host, enrolment.broker_port) == ("127.0.0.1", self.port)
        return self.settings(enrolment.certificate.encode(), enrolment.key.encode(), name=name)

    def coordinator(self) -> BrokerSettings:
        folder = self.root / "coordinator"
        key = (folder / "coordinator.key").read_bytes()
        return self.settings((folder / "coordinator.pem").read_bytes(), key, name="coordinator")

    def hang_up(self) -> None:
        """SIGHUP, as people would send it."""
        self.process.send_signal(signal.SIGHUP)

    def served_certificate(self) -> x509.Certificate:
        pem = ssl.get_server_certificate(("127.0.0.1", self.port), timeout=DEADLINE_S)
        return x509.load_pem_x509_certificate(pem.encode())


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, mosquitto_program: str) -> Iterator[Broker]:
    """What `init` and `add-device` made; only the address to listen on and the user it runs as are changed."""
    root, port = tmp_path_factory.mktemp("federation") / "provisioning", _free_port()
    options = ["--federation", FEDERATION, "--broker-host", "127.0.0.1", "--port", str(port)]
    assert main(["provision", "init", "--directory", str(root), *options]) == 0
    configuration = root / "broker" / "mosquitto.conf"
    text, n_listeners = re.subn(rf"(?m)^listener {port}$", f"listener {port} 127.0.0.1", configuration.read_text())
    assert n_listeners == 1
    configuration.write_text(text + (f"user {getpass.getuser()}\n" if os.geteuid() == 0 else ""))
    with (root.parent / "log").open("wb") as log:
        process = subprocess.Popen([mosquitto_program, "-c", str(configuration)], stdout=log, stderr=log)
    running = Broker(root=root, port=port, process=process)
    set_reload_command(running, ["kill", "-HUP", str(process.pid)])
    try:
        for device in ("pi-01", "pi-02"):
            assert running.provision("add-device", device) == 0
        yield running
    finally:
        process.terminate()
        process.wait(10)


class Client:
    """A logged-in link and what it receives. As a context manager it leaves at the end of the block."""

    def __init__(self, settings: BrokerSettings, name: str, *topics: str, wait_s: float = DEADLINE_S) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        subscriptions = [(topic, 1) for topic in topics]
        self.link = MqttLink(
            settings, client_id=name, events=self.events, subscriptions=subscriptions, persistent=False
        )
        self.link.start(wait_s=wait_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop()

    def next(self, kind: type[Kind]) -> Kind:
        """The next event of this kind; the others are passed over."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(event, kind):
                return event

    def next_payload(self) -> bytes:
        return self.next(Received).payload

    def has_stayed_connected(self) -> bool:
        """Whether nothing among what was not looked at yet says otherwise."""
        events = []
        while not self.events.empty():
            events.append(self.events.get())
        return self.link.connected and not any(isinstance(event, Disconnected) for event in events)


# What each may do.


def test_a_device_is_heard_on_its_own_topics_only(broker: Broker) -> None:
    with (
        Client(broker.coordinator(), "coordinator", EVERYTHING, "reft/v1/other/#") as coordinator,
        Client(broker.device("pi-01"), "pi-01") as device,
    ):
        device.link.publish(device_topic(FEDERATION, "pi-02", "report"), b"forged")
        device.link.publish(device_topic(FEDERATION, "pi-01", "task"), b"forged")
        device.link.publish(device_topic(FEDERATION, "pi-01", "certificate"), b"forged")
        device.link.publish(device_topic("other", "pi-01", "report"), b"forged")
        device.link.publish(blob_topic(FEDERATION, "0" * 16, 0), b"forged")
        device.link.publish(device_topic(FEDERATION, "pi-01", "report"), b"mine")
        assert coordinator.next_payload() == b"mine"
        assert "Not authorized" in device.next(Rejected).reason


def test_two_devices_hear_their_own_tasks_and_the_shared_blobs_only(broker: Broker) -> None:
    with (
        Client(broker.device("pi-01"), "pi-01", EVERYTHING) as first,
        Client(broker.device("pi-02"), "pi-02", device_topic(FEDERATION, "pi-01", "task"), EVERYTHING) as second,
        Client(broker.coordinator(), "coordinator") as coordinator,
    ):
        coordinator.link.publish(device_topic(FEDERATION, "pi-01", "task"), b"for pi-01")
        coordinator.link.publish(device_topic(FEDERATION, "pi-02", "task"), b"for pi-02")
        coordinator.link.publish(device_topic(FEDERATION, "pi-01", "report"), b"for the coordinator")
        coordinator.link.publish(blob_topic(FEDERATION, "0" * 16, 0), b"for all")
        assert [first.next_payload() for _ in range(2)] == [b"for pi-01", b"for all"]
        assert [second.next_payload() for _ in range(2)] == [b"for pi-02", b"for all"]


def test_a_device_measures_its_link_where_no_other_device_can_meddle(broker: Broker) -> None:
    agent = AgentSettings(
        device="pi-01", federation=FEDERATION, broker=broker.device("pi-01"), data=DataSettings(path="data")
    )
    assert measure_link(agent_login(agent), budget_s=0.1).up_bytes_per_s > 0

    mine, theirs = probe_topics("pi-01", "x"), probe_topics("pi-02", "x")
    with (
        Client(broker.device("pi-01"), "pi-01", f"{mine}/echo") as measuring,
        Client(broker.device("pi-02"), "pi-02", "reft/probe/#") as meddling,
    ):
        meddling.link.publish(f"{mine}/echo", b"forged")
        meddling.link.publish(f"{theirs}/echo", b"first")
        assert meddling.next_payload() == b"first"
        measuring.link.publish(f"{mine}/echo", b"mine")
        assert measuring.next_payload() == b"mine"
        meddling.link.publish(f"{theirs}/echo", b"second")
        assert meddling.next_payload() == b"second"


def test_a_client_id_of_another_takes_nothing_from_it(broker: Broker) -> None:
    task = device_topic(FEDERATION, "pi-02", "task")
    with (
        Client(broker.coordinator(), "coordinator") as coordinator,
        Client(broker.device("pi-02"), "pi-02", task) as victim,
        Client(broker.device("pi-01"), "pi-02", task) as thief,
    ):
        coordinator.link.publish(task, b"for pi-02")
        coordinator.link.publish(device_topic(FEDERATION, "pi-02", "task"), b"still for pi-02")
        assert [victim.next_payload() for _ in range(2)] == [b"for pi-02", b"still for pi-02"]
        assert victim.has_stayed_connected()
        thief.link.subscribe(device_topic(FEDERATION, "pi-01", "task"), 1)
        coordinator.link.publish(device_topic(FEDERATION, "pi-01", "task"), b"for pi-01", retain=True)
        assert thief.next_payload() == b"for pi-01"
        coordinator.link.publish(device_topic(FEDERATION, "pi-01", "task"), b"", retain=True)


def test_a_packet_beyond_the_limit_ends_the_connection_and_reaches_nobody(broker: Broker) -> None:
    topic = device_topic(FEDERATION, "pi-01", "report").encode()
    settings = broker.device("pi-01")
    context = settings.tls_context()
    assert context is not None
    with (
        Client(broker.coordinator(), "coordinator", EVERYTHING) as coordinator,
        socket.create_connection(("127.0.0.1", broker.port), timeout=DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as device,
    ):
        connect = b"\x00\x04MQTT\x04\x02\x00\x3c" + b"\x00\x05pi-01"
        device.sendall(bytes([0x10, len(connect)]) + connect)
        assert device.recv(4) == b"\x20\x02\x00\x00"  # CONNACK: accepted
        too_large = 131_072 + 1
        length = bytes([too_large % 128 | 0x80, too_large // 128 % 128 | 0x80, too_large // 128**2])
        device.sendall(b"\x30" + length + len(topic).to_bytes(2, "big") + topic)
        _read_to_the_end(device)
        coordinator.link.publish(device_topic(FEDERATION, "pi-01", "report"), b"next")
        assert coordinator.next_payload() == b"next"


# Who gets in.


def _client(
    broker: Broker, *, authority: Authority | None = None, now: datetime, lifetime: timedelta = YEAR
) -> BrokerSettings:
    key = new_client_key()
    signer = authority or broker.authority
    return broker.settings(signer.issue_client("pi-01", key.public_key(), lifetime=lifetime, now=now), private_pem(key))


def _server_only(broker: Broker, now: datetime) -> BrokerSettings:
    key = new_server_key()
    certificate = broker.authority.issue_server("pi-01", ["x"], key.public_key(), lifetime=YEAR, now=now)
    return broker.settings(certificate, private_pem(key))


def _of_another_authority(broker: Broker, now: datetime) -> BrokerSettings:
    other = Authority.create(FEDERATION, lifetime=YEAR, now=now)
    return _client(broker, authority=other, now=now)


def _without_certificate(broker: Broker, _now: datetime) -> BrokerSettings:
    return msgspec.structs.replace(broker.device("pi-01"), certificate_file=None, key_file=None)


def _without_tls(broker: Broker, now: datetime) -> BrokerSettings:
    return msgspec.structs.replace(_without_certificate(broker, now), ca_file=None)


REFUSED: dict[str, tuple[Callable[[Broker, datetime], BrokerSettings], str]] = {
    "no certificate": (_without_certificate, "wants a client certificate"),
    "another authority": (_of_another_authority, "does not know the authority"),
    "expired": (lambda broker, now: _client(broker, now=now - 2 * DAY, lifetime=DAY), "has expired"),
    "not yet valid": (lambda broker, now: _client(broker, now=now + DAY), "not valid yet"),
    "for servers only": (_server_only, "not for clients"),
    "no TLS": (_without_tls, "without an MQTT answer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_who_has_no_good_certificate_is_turned_away(broker: Broker, kind: str) -> None:
    make, words = REFUSED[kind]
    assert words in str(refusal(make(broker, datetime.now(UTC)), "pi-01"))


def test_a_good_certificate_made_the_same_way_gets_in(broker: Broker) -> None:
    Client(_client(broker, now=datetime.now(UTC)), "pi-01", wait_s=DEADLINE_S).link.stop()


# Who is put out.


def test_a_revoked_device_is_out_at_once_and_the_others_stay(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert broker.provision("add-device", "stolen") == 0
    with (
        Client(broker.device("pi-01"), "pi-01") as other,
        Client(broker.device("stolen"), "stolen", device_topic(FEDERATION, "stolen", "task")) as stolen,
    ):
        assert broker.provision("revoke", "stolen") == 0
        assert "a connection that it had is ended" in capsys.readouterr().out
        stolen.next(Disconnected)
        assert other.has_stayed_connected()
    assert "our certificate is revoked" in str(refusal(broker.device("stolen"), "stolen"))


def test_replacing_a_device_puts_its_old_key_out_and_lets_the_new_one_in(broker: Broker) -> None:
    assert broker.provision("add-device", "lost") == 0
    before = broker.device("lost")
    kept = broker.settings(
        Path(str(before.certificate_file)).read_bytes(), Path(str(before.key_file)).read_bytes(), name="old"
    )
    with Client(kept, "lost") as old:
        assert broker.provision("add-device", "lost", "--replace") == 0
        old.next(Disconnected)
    assert "our certificate is revoked" in str(refusal(kept, "lost"))
    Client(broker.device("lost"), "lost").link.stop()


def test_without_a_reload_command_a_revocation_waits_for_a_person_and_says_so(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert broker.provision("add-device", "sold") == 0
    command = ["kill", "-HUP", str(broker.process.pid)]
    set_reload_command(broker, [])
    try:
        with Client(broker.device("sold"), "sold") as sold:
            assert broker.provision("revoke", "sold") == 7
            (line,) = capsys.readouterr().err.splitlines()
            assert "sold is revoked and stays so" in line
            assert "has not read the new revocation list" in line
            assert sold.has_stayed_connected()
            broker.hang_up()
            set_reload_command(broker, ["true"])  # somebody did it; the broker may take a moment
            assert broker.provision("revoke", "sold") == 0
            sold.next(Disconnected)
    finally:
        set_reload_command(broker, command)


def test_a_revocation_list_past_its_date_locks_everybody_out_until_it_is_refreshed(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(broker.device("pi-02"), "pi-02") as connected:
        Provisioning.read(broker.root).write_revocation_list(datetime.now(UTC) - 90 * DAY)
        broker.hang_up()
        _wait_until_refused(broker.device("pi-01"))
        assert broker.provision("list") == 0
        assert broker.provision("refresh-crl") == 0
        assert "the broker has read it" in capsys.readouterr().out
        Client(broker.device("pi-01"), "pi-01").link.stop()
        assert connected.has_stayed_connected()


# Renewal.


def test_the_brokers_certificate_is_renewed_under_a_live_connection(broker: Broker) -> None:
    before = broker.served_certificate()
    task = device_topic(FEDERATION, "pi-01", "task")
    with (
        Client(broker.device("pi-01"), "pi-01", task) as device,
        Client(broker.coordinator(), "coordinator") as coordinator,
    ):
        assert broker.provision("renew", "broker") == 0
        deadline = time.monotonic() + DEADLINE_S
        while (after := broker.served_certificate()).serial_number == before.serial_number:
            assert time.monotonic() < deadline
        assert after.public_key() == before.public_key()
        coordinator.link.publish(task, b"as ever")
        assert device.next_payload() == b"as ever"
        assert device.has_stayed_connected()
        Client(broker.device("pi-02"), "pi-02").link.stop()


def test_a_renewed_certificate_waits_for_its_device_and_works_with_the_key_that_it_has(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert broker.provision("renew", "pi-02") == 0
    assert "do not have theirs yet" in capsys.readouterr().out
    assert broker.provision("renew", "--publish") == 0
    assert "pi-02: its certificate waits at the broker" in capsys.readouterr().out
    enrolled = broker.device("pi-02")
    with Client(enrolled, "pi-02", device_topic(FEDERATION, "pi-02", "certificate")) as device:
        certificate = device.next_payload()
    assert certificate != Path(str(enrolled.certificate_file)).read_bytes()
    renewed = broker.settings(certificate, Path(str(enrolled.key_file)).read_bytes(), name="renewed")
    Client(renewed, "pi-02").link.stop()


def test_a_revocation_covers_the_renewed_certificate_and_the_one_before(broker: Broker) -> None:
    assert broker.provision("add-device", "twice") == 0
    assert broker.provision("renew", "twice", "--publish") == 0
    enrolled = broker.device("twice")
    topic = device_topic(FEDERATION, "twice", "certificate")
    with Client(enrolled, "twice", topic) as device:
        certificate = device.next_payload()
    renewed = broker.settings(certificate, Path(str(enrolled.key_file)).read_bytes(), name="renewed")
    assert broker.provision("revoke", "twice") == 0
    for settings in (enrolled, renewed):
        assert "our certificate is revoked" in str(refusal(settings, "twice"))


def test_the_provisioner_can_leave_certificates_and_nothing_else(broker: Broker) -> None:
    key = new_client_key()
    certificate = broker.authority.issue_client("provisioner", key.public_key(), lifetime=DAY, now=datetime.now(UTC))
    settings = broker.settings(certificate, private_pem(key), name="provisioner")
    certificates = device_topic(FEDERATION, "pi-01", "certificate")
    with (
        Client(broker.device("pi-01"), "pi-01", EVERYTHING) as device,
        Client(settings, "provisioner", EVERYTHING) as provisioner,
    ):
        provisioner.link.publish(device_topic(FEDERATION, "pi-01", "task"), b"forged")
        provisioner.link.publish(certificates, b"for pi-01")
        assert device.next_payload() == b"for pi-01"
        assert not [event for event in _drained(provisioner.events) if isinstance(event, Received)]


def test_list_shows_who_has_what(broker: Broker, capsys: pytest.CaptureFixture[str]) -> None:
    assert broker.provision("list", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["broker"] == f"127.0.0.1:{broker.port}"
    rows = {row["name"]: row for row in document["certificates"]}
    assert {"broker", "coordinator", "pi-01"} <= set(rows)
    assert rows["pi-01"]["revoked_at"] is None
    assert 364 < rows["pi-01"]["expires_in_days"] < 366


def set_reload_command(broker: Broker, command: list[str]) -> None:
    path = broker.root / "provisioning.toml"
    path.write_text(re.sub(r"(?m)^reload_command = .*$", f"reload_command = {json.dumps(command)}", path.read_text()))


def _wait_until_refused(settings: BrokerSettings) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            Client(settings, "pi-01", wait_s=REFUSED_WITHIN_S).link.stop()
        except BrokerError:
            return
    pytest.fail("the broker still accepts")


def _read_to_the_end(connection: ssl.SSLSocket) -> None:
    """Returns when the other side has hung up; times out while it has not."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while connection.recv(4096):
            pass


def _drained(events: queue.SimpleQueue[Event]) -> list[Event]:
    found = []
    while not events.empty():
        found.append(events.get())
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
