"""How fast this device's way to the broker is: round trip, up and down.

Nothing but ordinary messages through the broker, so it measures what blocks will get, TLS and broker included. The
device talks to itself on two topics that nobody else has:

- round trip: a small message that comes back by subscription;
- up: blocks that nobody reads, then a message that comes back. A broker reads a connection in order, so the blocks have
  arrived then;
- down: a retained block, which the broker sends at each subscription.

The block is removed again. There is one, so that the access rules can name its topic: with room for more, a malicious
device could fill the broker. A broker whose rules lack the lines for probes that broker_config/reft-edge.acl has
refuses such messages or drops them without a word; the error says so.
"""

from __future__ import annotations

import queue
import secrets
import time
from dataclasses import dataclass
from statistics import median

from reft_edge.errors import BrokerError
from reft_edge.wire.mqtt import BrokerSettings, Event, MqttLink, Received, Rejected
from reft_edge.wire.outbox import SMALL_BYTES
from reft_edge.wire.topics import probe_topics

BLOCK_BYTES = 64 * 1024
"""As the blocks of a transfer."""

_ROUND_TRIPS = 10
_ANSWER_S = 15.0
"""Longest wait for an answer; the slowest link worth training over brings one block of 64 KiB in this time."""

_FIRST_ECHOES = 5
_FIRST_BLOCKS = 2
_MAX_BLOCKS = 64
"""4 MiB: at 100 MB/s that is 40 ms, enough to be timed."""

_END = b"end".ljust(SMALL_BYTES + 1)
"""Large enough to wait behind the blocks: our own link sends small messages first."""

_SHORTEST_S = 1e-6
"""Noise can make a transfer on loopback look shorter than a round trip."""


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """Payload rates and round trip between this device and the broker."""

    round_trip_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float


def measure_link(settings: BrokerSettings, *, budget_s: float = 3.0, connect_s: float = 10.0) -> LinkSpeed:
    """Measure for about `budget_s` in each direction. Raises `BrokerError` when the broker cannot be used."""
    client_id = f"probe-{secrets.token_hex(6)}"
    topics = probe_topics(settings.username, client_id)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    link = MqttLink(
        settings, client_id=client_id, events=events, subscriptions=[(f"{topics}/echo", 0)], persistent=False
    )
    link.start(wait_s=connect_s)
    try:
        return _Probe(link, events, topics=topics, address=settings.address).measure(budget_s)
    finally:
        link.stop()


class _Probe:
    """One connected link that talks to itself."""

    def __init__(self, link: MqttLink, events: queue.SimpleQueue[Event], *, topics: str, address: str) -> None:
        self._link = link
        self._events = events
        self._echo_topic = f"{topics}/echo"
        self._block_topic = f"{topics}/block"
        self._address = address

    def measure(self, budget_s: float) -> LinkSpeed:
        self._wait_until_subscribed()
        round_trip = median(self._echo(b"%d" % number) for number in range(_ROUND_TRIPS))
        n_blocks = _FIRST_BLOCKS
        try:
            up_s = self._send_blocks(n_blocks)
            while n_blocks < _MAX_BLOCKS and 4 * up_s < budget_s:
                n_blocks *= 2
                up_s = self._send_blocks(n_blocks)
            down_s = self._fetch_blocks(n_blocks)
        finally:
            self._link.unsubscribe(self._block_topic)
            self._link.publish(self._block_topic, b"", qos=1, retain=True)
        n_bytes = n_blocks * BLOCK_BYTES
        return LinkSpeed(
            round_trip_s=round_trip,
            # Up waits for one round trip besides its bytes, down for one a block.
            up_bytes_per_s=(n_bytes + len(_END)) / max(_SHORTEST_S, up_s - round_trip),
            down_bytes_per_s=n_bytes / max(_SHORTEST_S, down_s - n_blocks * round_trip),
        )

    def _wait_until_subscribed(self) -> None:
        """A message that overtakes its subscription never comes back, so the first one is sent more than once."""
        for _ in range(_FIRST_ECHOES):
            self._link.publish(self._echo_topic, b"first", qos=1)
            if self._arrives({self._echo_topic: b"first"}, within_s=_ANSWER_S / _FIRST_ECHOES):
                return
        raise self._silence()

    def _echo(self, payload: bytes) -> float:
        """Seconds until a small message has come back."""
        start = time.perf_counter()
        self._link.publish(self._echo_topic, payload, qos=1)
        self._wait_for({self._echo_topic: payload})
        return time.perf_counter() - start

    def _send_blocks(self, n_blocks: int) -> float:
        """Seconds until the broker has taken `n_blocks` blocks; the last of them it keeps."""
        start = time.perf_counter()
        for index in range(n_blocks):
            # Random bytes, so that no link on the way compresses them.
            block = secrets.token_bytes(BLOCK_BYTES)
            self._link.publish(self._block_topic, block, qos=1, retain=index == n_blocks - 1)
        self._link.publish(self._echo_topic, _END, qos=1)
        self._wait_for({self._echo_topic: _END})
        return time.perf_counter() - start

    def _fetch_blocks(self, n_blocks: int) -> float:
        """Seconds until the broker has sent the retained block `n_blocks` times."""
        start = time.perf_counter()
        for _ in range(n_blocks):
            self._link.subscribe(self._block_topic, 0)
            self._wait_for({self._block_topic: None})
        return time.perf_counter() - start

    def _wait_for(self, expected: dict[str, bytes | None]) -> None:
        if not self._arrives(expected, within_s=_ANSWER_S):
            raise self._silence()

    def _arrives(self, expected: dict[str, bytes | None], *, within_s: float) -> bool:
        """Take events until every expected topic has arrived, with the payload if one is given; False after a pause."""
        missing = dict(expected)
        while missing:
            try:
                event = self._events.get(timeout=within_s)
            except queue.Empty:
                return False
            if isinstance(event, Rejected):
                raise BrokerError(f"broker {self._address} refuses the measurement: {event.reason}")
            if isinstance(event, Received) and event.topic in missing:
                wanted = missing[event.topic]
                if wanted is None or wanted == event.payload:
                    del missing[event.topic]
        return True

    def _silence(self) -> BrokerError:
        return BrokerError(
            f"broker {self._address} does not return our own messages on {self._echo_topic} within {_ANSWER_S:g} s; "
            "its access rules must allow reft/probe/<user name>/echo and /block as broker_config/reft-edge.acl does"
        )
