"""An MQTT connection on which messages come twice, late and in another order, yet never against MQTT's rules.

What is done to a PUBLISH, drawn from a seed, and why it is legal (sections of MQTT 5.0; 3.1.1 says the same):

- *Late*: it waits, and everything behind it waits, as behind a lost TCP segment.
- *Out of order*: it steps aside while others pass, but never a message on its own topic, whose order a broker keeps
  (4.6). `within_topics` lifts that for QoS 0, as a broker with unordered topics may.
- *Twice, QoS 0*: the copy follows at once. No rule of MQTT forbids a sender to say something twice.
- *Twice, QoS 1*: as if its acknowledgement had been lost: the first PUBACK is swallowed, and the receiver gets the
  message again with DUP set. So the sender's packet id stays in use until the second PUBACK, and no more messages are
  unacknowledged than the sender knows of (receive maximum, 4.9). Not once a later message on the topic has passed: a
  receiver may see 1 2 2 3, but never the old one last (4.6), which would put a stale retained message back.
- Acknowledgements reach the sender in the order of its messages (4.6), so one may wait for an earlier one.

QoS 2 and all other packets pass as they are; a DISCONNECT only after everything before it. Pure logic.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from reft_edge.simulation.links.conversation import Direction
from reft_edge.simulation.links.mqtt_packets import Packet, PacketKind, PacketReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Disorder:
    """How much of it, for each PUBLISH in either direction; probabilities from 0 to 1."""

    seed: int = 0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0
    max_wait_s: float = 0.3
    """A late message or one that steps aside waits up to this long. Keep it below the keep-alive."""
    within_topics: bool = False


@dataclass(slots=True)
class DisorderCounters:
    """What was done, over all connections of a proxy."""

    duplicated: int = 0
    delayed: int = 0
    reordered: int = 0


class DisorderedConversation:
    """One MQTT connection in disorder. A `Conversation`.

    `number` tells connections with one seed apart: the n-th PUBLISH of the same connection meets the same fate.
    """

    def __init__(self, disorder: Disorder, number: int, counters: DisorderCounters) -> None:
        self._ways = {
            direction: _Way(disorder, random.Random(f"{disorder.seed}/{number}/{direction.value}"), counters)
            for direction in Direction
        }

    def feed(self, direction: Direction, data: bytes, now: float) -> None:
        way, back = self._ways[direction], self._ways[direction.opposite]
        for packet in way.reader.feed(data):
            if packet.kind == PacketKind.PUBLISH:
                way.publish(packet, now)
            elif packet.kind == PacketKind.PUBACK:
                for acknowledgement in back.acknowledge(packet, now):
                    way.pass_on(acknowledgement, now)
            elif packet.kind == PacketKind.DISCONNECT:
                way.release_all()
                way.pass_on(packet.raw, now)
            else:
                way.pass_on(packet.raw, now)

    def take(self, direction: Direction, now: float) -> bytes:
        return self._ways[direction].take(now)

    def end(self, direction: Direction) -> None:
        self._ways[direction].release_all()

    def next_release(self) -> float | None:
        return min((at for way in self._ways.values() if (at := way.next_release()) is not None), default=None)


class _Way:
    """The messages in one direction, with the acknowledgements that come back for them."""

    def __init__(self, disorder: Disorder, rng: random.Random, counters: DisorderCounters) -> None:
        self.reader = PacketReader()
        self._disorder = disorder
        self._rng = rng
        self._counters = counters
        self._line: deque[tuple[float, bytes]] = deque()
        """(release time, packet), in the order of leaving."""
        self._aside: list[tuple[float, Packet]] = []
        """Those that let others pass, in the order of arrival."""
        self._unacknowledged: dict[int, bytes | None] = {}
        """Packet id -> PUBACK once it is here, of QoS 1 messages in their sender's order."""
        self._to_repeat: dict[int, Packet] = {}
        self._latest: dict[str, int | None] = {}
        """Topic -> packet id of the last message on it."""

    def publish(self, packet: Packet, now: float) -> None:
        disorder = self._disorder
        twice, late, aside = (self._rng.random() < p for p in (disorder.duplicate, disorder.delay, disorder.reorder))
        wait_s = self._rng.uniform(0.0, disorder.max_wait_s)
        self._latest[packet.topic] = packet.packet_id
        if packet.qos == 1 and packet.packet_id is not None:
            self._unacknowledged.setdefault(packet.packet_id, None)
            if twice:
                self._to_repeat[packet.packet_id] = packet
        release_at = now
        if late:
            self._counters.delayed += 1
            release_at += wait_s
        if aside or self._must_stay_behind(packet):
            self._counters.reordered += aside
            self._aside.append((self._after_its_topic(packet, now + wait_s if aside else now), packet))
        else:
            self.pass_on(packet.raw, release_at)
        if twice and packet.qos == 0:
            self._counters.duplicated += 1
            if self._aside and self._aside[-1][1] is packet:
                self._aside.append((self._aside[-1][0], packet))
            else:
                self.pass_on(packet.repeated(), release_at)

    def acknowledge(self, puback: Packet, now: float) -> list[bytes]:
        """The acknowledgements that may go back to the sender, now that the receiver has sent this one."""
        packet_id = puback.packet_id
        if packet_id is None or packet_id not in self._unacknowledged:
            return [puback.raw]
        repeated = self._to_repeat.pop(packet_id, None)
        if repeated is not None and self._latest.get(repeated.topic) == packet_id:
            self._counters.duplicated += 1
            self.pass_on(repeated.repeated(), now)
            return []
        self._unacknowledged[packet_id] = puback.raw
        ready = []
        while self._unacknowledged and (first := next(iter(self._unacknowledged.values()))) is not None:
            del self._unacknowledged[next(iter(self._unacknowledged))]
            ready.append(first)
        return ready

    def pass_on(self, raw: bytes, release_at: float) -> None:
        """Take a place at the end of the line."""
        last = self._line[-1][0] if self._line else release_at
        self._line.append((max(last, release_at), raw))

    def take(self, now: float) -> bytes:
        """What leaves now, those that stepped aside last."""
        for release_at, packet in sorted(self._aside, key=lambda held: held[0]):
            if release_at <= now:
                self.pass_on(packet.raw, release_at)
        self._aside = [held for held in self._aside if held[0] > now]
        leaving = bytearray()
        while self._line and self._line[0][0] <= now:
            leaving += self._line.popleft()[1]
        return bytes(leaving)

    def release_all(self) -> None:
        """Whatever waits leaves with the next `take`, in its order."""
        packets = [raw for _, raw in self._line] + [packet.raw for _, packet in self._aside]
        self._aside.clear()
        self._line = deque((float("-inf"), raw) for raw in packets)

    def next_release(self) -> float | None:
        times = [release_at for release_at, _ in self._aside]
        if self._line:
            times.append(self._line[0][0])
        return min(times, default=None)

    def _must_stay_behind(self, packet: Packet) -> bool:
        """Whether a message on its topic is still aside."""
        return not self._may_overtake(packet) and any(held.topic == packet.topic for _, held in self._aside)

    def _after_its_topic(self, packet: Packet, release_at: float) -> float:
        if self._may_overtake(packet):
            return release_at
        return max([release_at, *(at for at, held in self._aside if held.topic == packet.topic)])

    def _may_overtake(self, packet: Packet) -> bool:
        return self._disorder.within_topics and packet.qos == 0
