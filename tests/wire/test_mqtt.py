"""The link and the couriers over real brokers: delivery, outages, limits, and errors a person can act on."""

from __future__ import annotations

import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from reft_edge.errors import BrokerError, ConfigError, LocalProtocolError
from reft_edge.simulation.brokers import RunningBroker, start_broker
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.broadcast import Broadcaster
from reft_edge.wire.mqtt import (
    MAX_PAYLOAD_BYTES,
    BrokerSettings,
    Connected,
    Disconnected,
    Event,
    MqttLink,
    Received,
    Rejected,
    parse_broker,
)
from reft_edge.wire.topics import blob_topic, device_topic
from reft_edge.wire.transfer import Courier, Delivered, Fetched, TransferEvent

WAIT_S = 20.0
"""Far beyond what anything here takes; only a failure waits this long."""


@pytest.fixture(autouse=True)
def quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_edge.wire.mqtt.MIN_RECONNECT_S", 0.05)
    monkeypatch.setattr("reft_edge.wire.mqtt.MAX_RECONNECT_S", 0.2)
    monkeypatch.setattr("reft_edge.wire.fetch.MIN_RETRY_S", 0.3)
    monkeypatch.setattr("reft_edge.wire.mqtt._TRIAL_TIMEOUT_S", 0.5)


@contextmanager
def link(
    broker: RunningBroker, client_id: str, **options: object
) -> Iterator[tuple[MqttLink, queue.SimpleQueue[Event]]]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    made = MqttLink(broker.settings, client_id=client_id, events=events, **options)  # type: ignore[arg-type]
    try:
        made.start(wait_s=WAIT_S)
        assert isinstance(events.get(timeout=WAIT_S), Connected)
        yield made, events
    finally:
        made.stop()


def next_of(events: queue.SimpleQueue[Event], kind: type[Event]) -> Event:
    """The next event of a kind; late answers to `subscribed` are passed over."""
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, kind) and not (isinstance(event, Received) and event.payload == b"ready"):
            return event


def subscribed(events: queue.SimpleQueue[Event], made: MqttLink, topic: str) -> None:
    """Subscribe and wait until it works: until our own message comes back. amqtt may handle the first one too early."""
    made.subscribe(topic, 1)
    for _ in range(100):
        made.publish(topic, b"ready")
        try:
            while (event := events.get(timeout=WAIT_S / 100)) != Received(
                topic=topic, payload=b"ready", retained=False
            ):
                assert not isinstance(event, Rejected)
        except queue.Empty:
            continue
        return
    pytest.fail("the subscription does not work")


class Peer:
    """A courier over a real link, with its loop in a thread, as the agent and the coordinator have it."""

    def __init__(self, settings: BrokerSettings, store: BlobStore, name: str, said: str, heard: str, federation: str):
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.outcomes: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self.federation = federation
        self.link = MqttLink(settings, client_id=name, events=self.events, subscriptions=[(heard, 0)])
        self.courier = Courier(
            store,
            lambda payload: self._send(said, payload),
            subscribe_block=lambda transfer, index: self.link.subscribe(blob_topic(federation, transfer, index), 1),
            unsubscribe_block=lambda transfer, index: self.link.unsubscribe(blob_topic(federation, transfer, index)),
        )
        self.calls: queue.SimpleQueue[Callable[[], list[TransferEvent]]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Peer:
        self.link.start(wait_s=WAIT_S)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
        self.link.stop(flush_s=0.0)
        self.courier.close()

    def _send(self, topic: str, payload: bytes) -> None:
        self.link.publish(topic, payload, qos=0)

    def _run(self) -> None:
        while not self._stopping:
            now = time.monotonic()
            due = self.courier.next_wakeup(now)
            try:
                event = self.events.get(timeout=min(0.02, max(0.0, (due or now + 1.0) - now)) or 0.001)
            except queue.Empty:
                event = None
            for outcome in self._handle(event, time.monotonic()):
                self.outcomes.put(outcome)

    def _handle(self, event: Event | None, now: float) -> list[TransferEvent]:
        outcomes: list[TransferEvent] = []
        while not self.calls.empty():
            outcomes += self.calls.get()()
        if isinstance(event, Received):
            outcomes += self.courier.handle(event.payload, now)
        elif isinstance(event, Connected | Disconnected):
            outcomes += self.courier.set_connected(isinstance(event, Connected), now)
        return outcomes + self.courier.tick(now)


def blob(n_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(n_bytes)


def peers(broker: RunningBroker, federation: str, tmp_path: Path) -> tuple[Peer, Peer, BlobStore, BlobStore]:
    up, down = device_topic(federation, "board", "up"), device_topic(federation, "board", "down")
    stores = BlobStore(tmp_path / "coordinator"), BlobStore(tmp_path / "device")
    coordinator = Peer(broker.settings, stores[0], f"{federation}-c", down, up, federation)
    device = Peer(broker.settings, stores[1], f"{federation}-d", up, down, federation)
    return coordinator, device, *stores


def test_a_megabyte_moves_both_ways_at_once(broker: RunningBroker, federation: str, tmp_path: Path) -> None:
    coordinator, device, at_coordinator, at_device = peers(broker, federation, tmp_path)
    down, up = at_coordinator.put(blob(1_000_000, 1)), at_device.put(blob(1_000_000, 2))
    with coordinator, device:
        device.calls.put(lambda: device.courier.fetch(down, time.monotonic()))
        coordinator.calls.put(lambda: coordinator.courier.fetch(up, time.monotonic()))
        outcomes = {coordinator.outcomes.get(timeout=WAIT_S) for _ in range(2)}
        outcomes |= {device.outcomes.get(timeout=WAIT_S) for _ in range(2)}
    assert outcomes == {Fetched(down.sha256), Delivered(down.sha256), Fetched(up.sha256), Delivered(up.sha256)}
    assert at_device.read(down) == blob(1_000_000, 1)
    assert at_coordinator.read(up) == blob(1_000_000, 2)
    assert device.courier.counters.bytes_down < 1.02 * 1_000_000 + 20_000


def test_a_transfer_survives_a_killed_broker(own_broker: RunningBroker, federation: str, tmp_path: Path) -> None:
    coordinator, device, at_coordinator, at_device = peers(own_broker, federation, tmp_path)
    ref = at_coordinator.put(blob(6_000_000))
    with coordinator, device:
        device.calls.put(lambda: device.courier.fetch(ref, time.monotonic()))
        give_up_at = time.monotonic() + WAIT_S
        while device.courier.counters.blocks_received < 5:
            assert time.monotonic() < give_up_at
        own_broker.kill()
        own_broker.start()
        assert device.outcomes.get(timeout=WAIT_S) == Fetched(ref.sha256)
    assert at_device.read(ref) == blob(6_000_000)
    assert device.courier.counters.blocks_received == 92


def test_one_broadcast_reaches_three_devices_while_the_coordinator_is_gone(
    broker: RunningBroker, federation: str, tmp_path: Path
) -> None:
    store = BlobStore(tmp_path / "coordinator")
    ref = store.put(blob(1_000_000))
    with link(broker, f"{federation}-c") as (made, _):
        broadcaster = Broadcaster(
            store,
            lambda transfer, name, payload: made.publish(blob_topic(federation, transfer, name), payload, retain=True),
        )
        broadcaster.seed(ref)
        assert broadcaster.step(1000) == 17
        made.stop(flush_s=WAIT_S)  # every block acknowledged
    with ExitStack() as stack:
        devices = [
            stack.enter_context(
                Peer(broker.settings, BlobStore(tmp_path / name), f"{federation}-{name}", "x", "y", federation)
            )
            for name in ("a", "b", "c")
        ]
        for device in devices:
            device.calls.put(lambda device=device: device.courier.fetch(ref, time.monotonic(), broadcast=True))
        for device in devices:
            assert device.outcomes.get(timeout=WAIT_S) == Fetched(ref.sha256)
            assert device.courier.counters.duplicates == 0


def test_what_is_published_while_offline_arrives_if_it_is_worth_keeping(
    own_broker: RunningBroker, federation: str
) -> None:
    topic = f"reft/v1/{federation}/x"
    with link(own_broker, f"{federation}-a") as (sender, sent):
        own_broker.kill()
        next_of(sent, Disconnected)
        assert not sender.publish(topic, b"block", qos=0)
        assert sender.publish(f"{topic}/status", b"old", retain=True)
        assert sender.publish(f"{topic}/status", b"new", retain=True)
        assert sender.publish(f"{topic}/expired", b"late", retain=True, expires_s=0.0)
        own_broker.start()
        next_of(sent, Connected)
        sender.stop(flush_s=WAIT_S)
    with link(own_broker, f"{federation}-b", subscriptions=[(f"{topic}/+", 1)]) as (reader, received):
        reader.publish(f"{topic}/end", b"")
        messages = [next_of(received, Received), next_of(received, Received)]
    assert [message.payload for message in messages if isinstance(message, Received)] == [b"new", b""]


def test_subscriptions_are_renewed_after_the_broker_lost_its_memory(own_broker: RunningBroker, federation: str) -> None:
    topic = f"reft/v1/{federation}/x"
    with link(own_broker, f"{federation}-a", subscriptions=[(topic, 1)]) as (made, events):
        own_broker.kill()
        next_of(events, Disconnected)
        made.subscribe(f"{topic}/later", 1)
        made.unsubscribe(topic)
        own_broker.start()
        next_of(events, Connected)
        made.publish(topic, b"not for us any more")
        made.publish(f"{topic}/later", b"again")
        assert next_of(events, Received) == Received(topic=f"{topic}/later", payload=b"again", retained=False)


def test_subscriptions_of_an_earlier_process_bring_nothing(broker: RunningBroker, federation: str) -> None:
    old, new = f"reft/v1/{federation}/old", f"reft/v1/{federation}/new"
    with link(broker, federation, subscriptions=[(old, 1)]) as (made, events):
        subscribed(events, made, new)
    with link(broker, federation, subscriptions=[(new, 1)]) as (made, events):
        made.publish(old, b"for the earlier process")
        made.publish(new, b"for us")
        assert next_of(events, Received) == Received(topic=new, payload=b"for us", retained=False)


def test_the_will_is_published_when_a_client_vanishes_and_not_when_it_leaves(
    broker: RunningBroker, federation: str
) -> None:
    topic = f"reft/v1/{federation}/status"
    with link(broker, f"{federation}-w") as (watcher, events):
        subscribed(events, watcher, topic)
        with link(broker, f"{federation}-a", will=(topic, b"gone")) as (polite, polite_events):
            subscribed(polite_events, polite, f"{topic}/settled")
            polite.publish(topic, b"bye")
        assert next_of(events, Received) == Received(topic=topic, payload=b"bye", retained=False)
        with client_process(broker, topic) as process:
            process.kill()
        assert next_of(events, Received) == Received(topic=topic, payload=b"gone", retained=False)


CLIENT_WITH_WILL = """
import queue, sys
from reft_edge.wire.mqtt import BrokerSettings, MqttLink
host, port, version, topic = sys.argv[1:]
settings = BrokerSettings(host=host, port=int(port), mqtt_version=version)
MqttLink(settings, client_id="doomed", events=queue.SimpleQueue(), will=(topic, b"gone")).start(wait_s=20)
print("up", flush=True)
sys.stdin.read()
"""


@contextmanager
def client_process(broker: RunningBroker, will_topic: str) -> Iterator[subprocess.Popen[bytes]]:
    address = [broker.host, str(broker.port), broker.settings.mqtt_version, will_topic]
    command = [sys.executable, "-c", CLIENT_WITH_WILL, *address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield process


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (BrokerSettings(host="127.0.0.1", port=1), "nobody listens at 127.0.0.1:1"),
        (BrokerSettings(host="no-such-host.invalid"), "host name is not known"),
    ],
)
def test_a_wrong_address_is_one_clear_line(settings: BrokerSettings, words: str) -> None:
    made = MqttLink(settings, client_id="x", events=queue.SimpleQueue())
    with pytest.raises(BrokerError, match=words):
        made.start(wait_s=0.5)
    assert not made.publish("x", b"")


def test_a_server_that_is_no_mqtt_broker_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        made = MqttLink(
            BrokerSettings(host="127.0.0.1", port=server.getsockname()[1], connect_timeout_s=0.2),
            client_id="x",
            events=queue.SimpleQueue(),
        )
        with pytest.raises(BrokerError, match="does not answer"):
            made.start(wait_s=1.0)


@contextmanager
def broker_that_sends(flood: bytes, times: int) -> Iterator[tuple[BrokerSettings, list[int]]]:
    """A broker that lets one client in and then sends `flood` so often; the list tells how many it got rid of."""
    sent = [0]

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, suppress(OSError):
            client.recv(4096)  # CONNECT
            client.sendall(bytes([0x20, 2, 0, 0]))  # CONNACK of MQTT 3.1.1
            for _ in range(times):
                client.sendall(flood)
                sent[0] += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield BrokerSettings(host="127.0.0.1", port=listener.getsockname()[1], mqtt_version="3.1.1"), sent
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("begin", "flood", "words"),
    [
        (bytes([0x30, 0xFF, 0xFF, 0xFF, 0x7F]), bytes(2**20), "a packet of 268435455 bytes; at most 4194304 are read"),
        (b"", bytes([0x34, 0x80, 0x80, 4, 0, 1]) + b"t" + bytes(2 + 65_536 - 5), "at QoS 2, which nobody asked for"),
    ],
)
def test_a_broker_cannot_fill_our_memory(begin: bytes, flood: bytes, words: str) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with broker_that_sends(begin + flood, 256) as (settings, sent):
        made = MqttLink(settings, client_id="me", events=events, subscriptions=[("t", 1)])
        try:
            made.start()
            ended = next_of(events, Disconnected)
        finally:
            made.stop()
    assert isinstance(ended, Disconnected)
    assert words in ended.reason
    assert sent[0] < 64  # what the kernel takes is in it


def test_a_broker_that_goes_on_sending_does_not_keep_us_from_leaving() -> None:
    message = bytes([0x30, 0x80, 0x80, 4, 0, 1]) + b"t" + bytes(65_536 - 3)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with broker_that_sends(message, 2**40) as (settings, _):
        made = MqttLink(settings, client_id="me", events=events, subscriptions=[("t", 1)])
        made.start(wait_s=WAIT_S)
        next_of(events, Received)
        made.stop()


def poll_for(events: queue.SimpleQueue[Event], kind: type[Event]) -> Event | None:
    """The next event if it comes soon and is of a kind."""
    try:
        event = events.get(timeout=0.05)
    except queue.Empty:
        return None
    return event if isinstance(event, kind) else None


def test_a_broker_that_loses_an_acknowledgement_hears_the_message_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_edge.wire.mqtt.ACKNOWLEDGED_WITHIN_S", 0.2)
    heard: list[bool] = []

    def serve(listener: socket.socket) -> None:
        for acknowledgement in (b"", bytes([0x40, 2])):
            client, _ = listener.accept()
            with client:
                client.recv(4096)  # CONNECT
                client.sendall(bytes([0x20, 2, 0, 0]))  # CONNACK of MQTT 3.1.1
                packet = client.recv(4096)
                heard.append(b"word" in packet)
                if acknowledgement:
                    client.sendall(acknowledgement + packet[5:7])
                while client.recv(4096):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        settings = BrokerSettings(host="127.0.0.1", port=listener.getsockname()[1], mqtt_version="3.1.1", keepalive_s=5)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        made = MqttLink(settings, client_id="me", events=events)
        made.publish("t", b"word")
        made.start()
        try:
            next_of(events, Connected)
            while (ended := poll_for(events, Disconnected)) is None:
                made.publish("t", b"", qos=0)  # is no acknowledgement
            wait_until_said(made)
        finally:
            made.stop()
        thread.join(WAIT_S)
    assert isinstance(ended, Disconnected)
    assert "has acknowledged nothing for 0.2 s" in ended.reason
    assert heard == [True, True]


def test_a_service_starts_before_its_broker(own_broker: RunningBroker, federation: str) -> None:
    own_broker.stop()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    made = MqttLink(own_broker.settings, client_id=federation, events=events)
    made.start()
    try:
        own_broker.start()
        assert isinstance(next_of(events, Connected), Connected)
    finally:
        made.stop()


def test_auto_finds_the_version_of_mqtt_that_the_broker_speaks(broker: RunningBroker, federation: str) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    made = MqttLink(BrokerSettings(host=broker.host, port=broker.port), client_id=federation, events=events)
    made.start(wait_s=WAIT_S)
    made.stop()
    event = next_of(events, Connected)
    assert isinstance(event, Connected)
    assert event.mqtt_version == broker.settings.mqtt_version


def test_messages_beyond_the_packet_limit_are_refused_here_and_the_largest_passes(
    broker: RunningBroker, federation: str
) -> None:
    topic = f"reft/v1/{federation}/x"
    with link(broker, federation, subscriptions=[(topic, 1)]) as (made, events):
        with pytest.raises(LocalProtocolError, match="at most"):
            made.publish(topic, bytes(MAX_PAYLOAD_BYTES + 1))
        made.publish(topic, bytes(MAX_PAYLOAD_BYTES))
        message = next_of(events, Received)
        assert isinstance(message, Received)
        assert len(message.payload) == MAX_PAYLOAD_BYTES


def test_small_messages_overtake_blocks_and_the_queue_is_bounded(broker: RunningBroker, federation: str) -> None:
    topic = f"reft/v1/{federation}/x"
    with link(broker, federation, subscriptions=[(topic, 1)], max_queued_bytes=20 * 65_536) as (made, events):
        taken = [made.publish(topic, bytes(65_536)) for _ in range(400)]
        made.publish(topic, b"urgent")
        order = [next_of(events, Received) for _ in range(sum(taken) + 1)]
    assert False in taken
    position = next(n for n, event in enumerate(order) if isinstance(event, Received) and event.payload == b"urgent")
    assert position < len(order) - 1


def test_a_slow_owner_stops_the_reading_and_loses_nothing(broker: RunningBroker, federation: str) -> None:
    topic = f"reft/v1/{federation}/x"
    with link(broker, federation, subscriptions=[(topic, 1)]) as (made, events):
        for _ in range(600):
            assert made.publish(topic, b"small")
        for _ in range(600):
            assert isinstance(next_of(events, Received), Received)


def test_addresses_are_parsed_and_nonsense_is_explained() -> None:
    assert parse_broker("pi.local").address == "pi.local:1883"
    assert parse_broker("10.0.0.1:1884").address == "10.0.0.1:1884"
    assert parse_broker("mqtts://pi.local").address == "pi.local:8883"
    assert parse_broker("mqtts://pi.local").uses_tls
    assert parse_broker("[::1]:1885").host == "::1"
    for nonsense in ("", ":1883", "pi.local:port", "pi.local:0", "http://pi.local", "pi.local:99999"):
        with pytest.raises(ConfigError):
            parse_broker(nonsense)


def test_missing_credential_files_are_named_before_connecting(tmp_path: Path) -> None:
    settings = [
        BrokerSettings(username="u", password_file="missing-password"),  # noqa: S106 - a file's name
        BrokerSettings(ca_file="missing-ca"),
        BrokerSettings(certificate_file="missing-certificate", key_file="missing-key"),
    ]
    for wrong in settings:
        with pytest.raises(ConfigError, match=r"missing-(password|ca|certificate)"):
            MqttLink(wrong, client_id="x", events=queue.SimpleQueue()).start()
    assert settings[0].resolved_in(tmp_path).password_file == str(tmp_path / "missing-password")


def test_a_taken_port_is_one_clear_line(broker: RunningBroker, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="cannot listen"):
        start_broker(broker.kind, directory=tmp_path, port=broker.port)


def test_all_is_said_when_the_broker_has_acknowledged_it(own_broker: RunningBroker) -> None:
    with link(own_broker, "speaker") as (speaker, events):
        speaker.publish("x", b"1")
        wait_until_said(speaker)
        own_broker.kill()
        next_of(events, Disconnected)
        speaker.publish("x", b"2")
        assert not speaker.all_said
        own_broker.start()
        wait_until_said(speaker)


def wait_until_said(speaker: MqttLink) -> None:
    end = time.monotonic() + WAIT_S
    while not speaker.all_said:
        assert time.monotonic() < end
        time.sleep(0.01)
