"""Messages in disorder: twice, late and out of order, but framing, packet ids and each topic's order hold."""

from __future__ import annotations

import itertools
import queue
import random
import time

import pytest

from reft_edge.errors import RemoteProtocolError
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.simulation.links.conversation import Direction
from reft_edge.simulation.links.disorder import Disorder, DisorderCounters, DisorderedConversation
from reft_edge.simulation.links.mqtt_packets import Packet, PacketKind, PacketReader
from reft_edge.simulation.links.mqtt_proxy import MqttProxy
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.mqtt import Connected, Disconnected, MqttLink, Received

ALWAYS = Disorder(seed=1, duplicate=1.0)
TIMEOUT_S = 30.0


def packet(kind: int, flags: int, body: bytes) -> bytes:
    length = bytearray()
    rest = len(body)
    while True:
        rest, digit = divmod(rest, 128)
        length.append(digit | (0x80 if rest else 0))
        if not rest:
            return bytes([kind << 4 | flags, *length]) + body


def publish(topic: str, payload: bytes, packet_id: int | None = None) -> bytes:
    name = topic.encode()
    number = b"" if packet_id is None else packet_id.to_bytes(2, "big")
    return packet(3, 0 if packet_id is None else 2, len(name).to_bytes(2, "big") + name + number + payload)


def puback(packet_id: int) -> bytes:
    return packet(4, 0, packet_id.to_bytes(2, "big"))


def read(data: bytes) -> list[Packet]:
    return PacketReader().feed(data)


def converse(disorder: Disorder) -> DisorderedConversation:
    return DisorderedConversation(disorder, 1, DisorderCounters())


def test_packets_are_found_however_the_bytes_are_cut() -> None:
    rng = random.Random(3)
    packets = [publish("a/b", bytes(200), 7), puback(7), publish("c", bytes(20_000)), packet(12, 0, b"")]
    stream = b"".join(packets)
    for _ in range(50):
        cuts = sorted(rng.sample(range(1, len(stream)), 20))
        reader = PacketReader()
        found = [
            one for start, end in itertools.pairwise([0, *cuts, len(stream)]) for one in reader.feed(stream[start:end])
        ]
        assert [one.raw for one in found] == packets
    assert [(one.topic, one.qos, one.packet_id) for one in found] == [
        ("a/b", 1, 7),
        ("", 0, 7),
        ("c", 0, None),
        ("", 0, None),
    ]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x30\xff\xff\xff\xff\x01",
        b"\x30\xff\xff\xff\x7f",
        packet(3, 0, b"\0\0x"),
        packet(4, 0, b"\0"),
        packet(3, 0, b"\0\x09x"),
    ],
)
def test_what_is_no_mqtt_is_refused(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        PacketReader().feed(garbage + bytes(10))


def test_a_message_at_qos_1_comes_again_as_if_its_acknowledgement_had_been_lost() -> None:
    link = converse(ALWAYS)
    link.feed(Direction.UP, publish("t", b"x", 5), 0.0)
    assert link.take(Direction.UP, 0.0) == publish("t", b"x", 5)
    link.feed(Direction.DOWN, puback(5), 1.0)
    (again,) = read(link.take(Direction.UP, 1.0))
    assert (again.packet_id, again.raw[0]) == (5, 0x3A)  # PUBLISH, DUP, QoS 1
    assert link.take(Direction.DOWN, 1.0) == b""
    link.feed(Direction.DOWN, puback(5), 2.0)
    assert link.take(Direction.DOWN, 2.0) == puback(5)
    link.feed(Direction.DOWN, puback(9), 3.0)
    assert link.take(Direction.DOWN, 3.0) == puback(9)


def test_an_old_message_never_comes_last_on_its_topic() -> None:
    link = converse(ALWAYS)
    link.feed(Direction.UP, publish("t", b"old", 5) + publish("t", b"new", 6), 0.0)
    link.take(Direction.UP, 0.0)
    link.feed(Direction.DOWN, puback(5) + puback(6), 1.0)
    assert [one.packet_id for one in read(link.take(Direction.UP, 1.0))] == [6]
    assert link.take(Direction.DOWN, 1.0) == puback(5)


def test_acknowledgements_come_back_in_the_order_of_the_messages() -> None:
    link = converse(Disorder())
    link.feed(Direction.DOWN, publish("a", b"", 1) + publish("b", b"", 2), 0.0)
    link.feed(Direction.UP, puback(2), 0.0)
    assert link.take(Direction.UP, 0.0) == b""
    link.feed(Direction.UP, puback(1), 0.0)
    assert link.take(Direction.UP, 0.0) == puback(1) + puback(2)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_each_topic_keeps_its_order(seed: int) -> None:
    rng = random.Random(seed)
    link = converse(Disorder(seed=seed, duplicate=0.3, delay=0.3, reorder=0.5))
    sent = [(rng.choice("abc"), str(number).encode()) for number in range(200)]
    now, arrived = 0.0, []
    for topic, payload in sent:
        now += rng.uniform(0.0, 0.05)
        link.feed(Direction.DOWN, publish(topic, payload), now)
        arrived += read(link.take(Direction.DOWN, now))
    while (release := link.next_release()) is not None:
        arrived += read(link.take(Direction.DOWN, release))
    for name in "abc":
        numbers = [int(one.raw[5:]) for one in arrived if one.topic == name]
        assert numbers == sorted(numbers)
    assert {(one.topic, one.raw[5:]) for one in arrived} == set(sent)
    assert [int(one.raw[5:]) for one in arrived] != sorted(int(one.raw[5:]) for one in arrived)


def test_nothing_is_left_behind_at_the_end_and_a_farewell_comes_last() -> None:
    link = converse(Disorder(reorder=1.0, max_wait_s=1000.0))
    farewell = packet(PacketKind.DISCONNECT, 0, b"")
    link.feed(Direction.UP, publish("t", b"x", 1) + publish("u", b"y", 2) + farewell, 0.0)
    assert link.take(Direction.UP, 0.0) == publish("t", b"x", 1) + publish("u", b"y", 2) + farewell
    link.feed(Direction.DOWN, publish("v", b"z"), 0.0)
    assert link.take(Direction.DOWN, 0.0) == b""
    link.end(Direction.DOWN)
    assert link.take(Direction.DOWN, 0.0) == publish("v", b"z")


def test_a_real_broker_and_client_get_along_with_it(broker: RunningBroker, federation: str) -> None:
    """Every message arrives, in its topic's order but for repetitions, over one connection that never breaks."""
    disorder = Disorder(seed=4, duplicate=0.3, delay=0.2, reorder=0.3, max_wait_s=0.05)
    with MqttProxy(broker.host, broker.port, disorder) as proxy:
        settings = BrokerSettings(host=proxy.host, port=proxy.port, mqtt_version=broker.settings.mqtt_version)
        events: queue.SimpleQueue[object] = queue.SimpleQueue()
        topics = [f"{federation}/{name}" for name in "abc"]
        link = MqttLink(
            settings,
            client_id=federation,
            events=events,  # type: ignore[arg-type]
            subscriptions=[(topic, 1) for topic in topics],
            persistent=False,
        )
        link.start(wait_s=TIMEOUT_S)
        try:
            sent = [(topic, str(number).encode()) for number in range(60) for topic in topics]
            for topic, payload in sent:
                assert link.publish(topic, payload)
            arrived: list[tuple[str, bytes]] = []
            deadline = time.monotonic() + TIMEOUT_S
            while set(arrived) != set(sent):
                event = events.get(timeout=deadline - time.monotonic())
                assert not isinstance(event, Disconnected)
                if isinstance(event, Received):
                    arrived.append((event.topic, event.payload))
                else:
                    assert isinstance(event, Connected)
        finally:
            link.stop()
        for topic in topics:
            firsts = list(dict.fromkeys(payload for name, payload in arrived if name == topic))
            assert firsts == [payload for name, payload in sent if name == topic]
        assert len(arrived) > len(sent)
        assert min(proxy.counters.duplicated, proxy.counters.delayed, proxy.counters.reordered) > 0
