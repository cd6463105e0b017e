"""What waits to be sent: bounded, ordered by urgency, without I/O.

The MQTT client library has a queue of its own, whose rules differ by version, QoS and connection state. It is bypassed:
the network thread takes one message at a time from here when the socket has nothing left to write. So a control
message waits behind one block at most, an offline device keeps only what is worth keeping, and memory is bounded.

Order: subscriptions, small messages, blocks. Within each the order of `put`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

SMALL_BYTES = 8 * 1024
"""8 KiB: larger messages are blocks and hash lists, and wait behind control messages."""

MAX_SMALL_MESSAGES = 2000
"""Control messages have some hundred bytes; a device that is offline for a day does not collect this many."""


MAX_BLOCKS_PER_TOPIC = 24
MAX_ANSWERS_PER_TOPIC = 64
"""Large and small messages at QoS 0 on one topic: what one peer asked for. Two windows of 8 blocks and hash lists of
2 GiB of blob have room. A peer that asks without end must leave room for others; what is dropped is asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One message to publish. `expires_at` is on the monotonic clock."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    expires_at: float | None = None


class Outbox:
    """Queues by urgency and QoS. Not thread-safe: its owner holds a lock.

    A retained QoS 1 message replaces one that still waits on the same topic: only the last is of use to anybody.
    """

    def __init__(self, *, max_bulk_bytes: int, max_small_messages: int = MAX_SMALL_MESSAGES) -> None:
        self._max_bulk_bytes = max_bulk_bytes
        self._max_small_messages = max_small_messages
        self._lanes: list[dict[object, Outgoing]] = [{}, {}, {}, {}]
        self._sequence = 0
        self.bulk_bytes = 0
        """Bytes of the large messages that wait."""
        self._answers: Counter[tuple[str, bool]] = Counter()
        """(topic, whether large) -> QoS 0 messages that wait."""

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes)

    def put(self, message: Outgoing) -> bool:
        """Queue `message`; False, and nothing is queued, when that would exceed the bounds."""
        lane, key = self._lanes[_lane(message)], self._key(message)
        replaced = lane.get(key)
        bulk_bytes = self.bulk_bytes + _bulk_bytes(message) - (_bulk_bytes(replaced) if replaced else 0)
        n_small = len(self._lanes[0]) + len(self._lanes[1])
        if bulk_bytes > self._max_bulk_bytes or (not _is_bulk(message) and n_small >= self._max_small_messages):
            return False
        if message.qos == 0:
            kind = _answer(message)
            if self._answers[kind] >= (MAX_BLOCKS_PER_TOPIC if _is_bulk(message) else MAX_ANSWERS_PER_TOPIC):
                return False
            self._answers[kind] += 1
        lane[key] = message
        self.bulk_bytes = bulk_bytes
        return True

    def take(self, now: float, *, allow_qos1: bool) -> Outgoing | None:
        """Remove and return the most urgent message; expired ones are dropped on the way."""
        for lane in self._lanes:
            while lane:
                key, message = next(iter(lane.items()))
                if message.qos > 0 and not allow_qos1:
                    break
                del lane[key]
                self.bulk_bytes -= _bulk_bytes(message)
                if message.qos == 0:
                    self._forget_answer(_answer(message))
                if message.expires_at is None or message.expires_at > now:
                    return message
        return None

    def restore(self, messages: list[Outgoing]) -> None:
        """Put unacknowledged QoS 1 messages back to the front, in order; a newer retained one on a topic wins.

        They were within the bounds once, so the bounds are not applied again.
        """
        for number, lane in enumerate(self._lanes):
            front = {self._key(message): message for message in messages if _lane(message) == number}
            self._lanes[number] = {**front, **lane}
        self._count()

    def topics(self) -> set[str]:
        """The topics of all messages that wait."""
        return {message.topic for lane in self._lanes for message in lane.values()}

    def drop_qos0(self) -> int:
        """Forget QoS 0 messages, because their receivers ask again; returns how many."""
        before = len(self)
        self._lanes = [{key: m for key, m in lane.items() if m.qos > 0} for lane in self._lanes]
        self._count()
        return before - len(self)

    def _count(self) -> None:
        waiting = [message for lane in self._lanes for message in lane.values()]
        self.bulk_bytes = sum(_bulk_bytes(message) for message in waiting)
        self._answers = Counter(_answer(message) for message in waiting if message.qos == 0)

    def _forget_answer(self, kind: tuple[str, bool]) -> None:
        self._answers[kind] -= 1
        if not self._answers[kind]:
            del self._answers[kind]  # topics come and go

    def _key(self, message: Outgoing) -> object:
        if message.retain and message.qos > 0:
            return message.topic
        self._sequence += 1
        return self._sequence


def _is_bulk(message: Outgoing) -> bool:
    return len(message.payload) > SMALL_BYTES


def _bulk_bytes(message: Outgoing) -> int:
    return len(message.payload) if _is_bulk(message) else 0


def _answer(message: Outgoing) -> tuple[str, bool]:
    return message.topic, _is_bulk(message)


def _lane(message: Outgoing) -> int:
    """Small QoS 1, small QoS 0, large QoS 0 (somebody asked for it), large QoS 1 (seeding)."""
    if _is_bulk(message):
        return 3 if message.qos else 2
    return 0 if message.qos else 1
