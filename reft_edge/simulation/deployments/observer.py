"""Somebody at the broker who reads everything and says nothing: what passes there, and how many bytes it was.

What devices say is noted with the moment when it came. The broker's counters come every second, so a span of time is
measured to a second at each end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from reft_edge.errors import FederationError, RemoteProtocolError
from reft_edge.simulation.deployments.site import FEDERATION, OBSERVER, Site
from reft_edge.wire.deployment import Condition, decode_condition
from reft_edge.wire.link_events import Connected, Event, Received
from reft_edge.wire.mqtt import MqttLink
from reft_edge.wire.signing import unseal
from reft_edge.wire.topics import PREFIX, all_devices_filter, is_blob_topic, parse_device_topic

_SAYS = "$SYS/broker/bytes/received"
_IS_TOLD = "$SYS/broker/bytes/sent"
_CONNECT_WITHIN_S = 30.0
_COUNTED_WITHIN_S = 5.0
_READY = ("status", "profile")


@dataclass(frozen=True, kw_only=True)
class Said:
    """A condition, and when it came; Unix time."""

    condition: Condition
    at: float


@dataclass(frozen=True, kw_only=True)
class BrokerBytes:
    """What has passed the broker since it was started, MQTT packets without TLS."""

    received: int
    sent: int


class Observer:
    """Connected for the length of the block. With `blocks` it hears all that is broadcast, and so counts as traffic."""

    def __init__(self, site: Site, *, blocks: bool = False) -> None:
        self._lock = threading.Condition()
        self._ready: dict[str, set[str]] = {kind: set() for kind in _READY}
        self._said: defaultdict[str, list[Said]] = defaultdict(list)
        self._counters: dict[str, int] = {}
        self._n_counted = 0
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._blocks: set[str] = set()
        topics = [(all_devices_filter(FEDERATION, kind), 1) for kind in ("status", "profile", "condition")]
        if blocks:
            topics.append((f"{PREFIX}/{FEDERATION}/blob/#", 1))
        self._link = MqttLink(
            site.observer,
            client_id=OBSERVER,
            events=self._events,  # type: ignore[arg-type]  # only we put None into it
            subscriptions=[*topics, (_SAYS, 0), (_IS_TOLD, 0)],
            persistent=False,
        )
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._link.start(wait_s=_CONNECT_WITHIN_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._link.stop()
        self._events.put(None)
        self._thread.join()

    def wait_for_devices(self, devices: set[str], *, timeout_s: float) -> None:
        """Until all of them have told what they are. Raises `FederationError`."""
        with self._lock:
            if not self._lock.wait_for(lambda: all(devices <= known for known in self._ready.values()), timeout_s):
                there = set.intersection(*self._ready.values())
                raise FederationError(f"{', '.join(sorted(devices - there))} did not come within {timeout_s:g} s")

    def said(self, device: str, *, since: float) -> list[Said]:
        """Conditions of a device, oldest first."""
        with self._lock:
            return [one for one in self._said[device] if one.at >= since]

    def bytes_until_now(self) -> BrokerBytes:
        """The broker's counters, when it has told them next. Raises `FederationError`."""
        with self._lock:
            wanted = self._n_counted + 2  # the first may be of before we asked
            if not self._lock.wait_for(lambda: self._n_counted >= wanted, _COUNTED_WITHIN_S):
                raise FederationError("the broker does not tell its counters; is it another one than Mosquitto?")
            return BrokerBytes(received=self._counters[_SAYS], sent=self._counters[_IS_TOLD])

    def blocks(self) -> int:
        """That the broker holds of blobs, offers included, as far as it has told."""
        with self._lock:
            return len(self._blocks)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            with self._lock:
                if isinstance(event, Connected):
                    self._blocks.clear()  # it tells again what it holds
                elif isinstance(event, Received):
                    self._note(event)
                self._lock.notify_all()

    def _note(self, event: Received) -> None:
        if event.topic in (_SAYS, _IS_TOLD):
            self._counters[event.topic] = int(event.payload)
            self._n_counted += event.topic == _IS_TOLD  # tells only what has changed, as this does by being told
            return
        if is_blob_topic(FEDERATION, event.topic):
            (self._blocks.add if event.payload else self._blocks.discard)(event.topic)
            return
        device, kind = parse_device_topic(FEDERATION, event.topic)
        if kind in _READY:
            self._ready[kind].add(device)
            return
        try:
            condition = decode_condition(unseal(event.topic, event.payload).message)
        except RemoteProtocolError:
            return  # cleared
        self._said[device].append(Said(condition=condition, at=time.time()))
