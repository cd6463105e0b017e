"""Devices that only transfer: the agent's link and courier without its tasks. A process, told by its argument.

It ends when it is killed, or its parent is.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from reft_edge.simulation.recovery import ends
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.messages import Status, encode
from reft_edge.wire.mqtt import Connected, Disconnected, Event, MqttLink, Received
from reft_edge.wire.topics import DeviceTopic, blob_topic, device_topic, is_blob_topic
from reft_edge.wire.transfer import Courier, Delivered, Fetched, Lost, TransferEvent


class DeviceEnd:
    """One device."""

    def __init__(self, orders: ends.DeviceOrders, device: str) -> None:
        self._orders = orders
        self._device = device
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._link = MqttLink(
            orders.broker,
            client_id=device,
            events=self._events,
            will=(self._topic("status"), encode(Status(online=False))),
            subscriptions=[(self._topic("task"), 1), (self._topic("down"), 0)],
        )
        self._courier = Courier(
            BlobStore(Path(orders.directory) / device),
            lambda payload: self._publish("up", payload, qos=0),
            subscribe_block=lambda transfer, name: self._link.subscribe(self._block_topic(transfer, name), 0),
            unsubscribe_block=lambda transfer, name: self._link.unsubscribe(self._block_topic(transfer, name)),
        )

    def run(self) -> None:
        """Transfer until the process ends."""
        self._link.start()
        for ref in self._orders.wanted:
            self._tell(self._courier.fetch(ref, time.monotonic(), broadcast=self._orders.broadcast))
        while True:
            now = time.monotonic()
            due = self._courier.next_wakeup(now)
            try:
                self._handle(self._events.get(timeout=None if due is None else max(0.0, due - now)))
            except queue.Empty:
                self._tell(self._courier.tick(time.monotonic()))

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Connected():
                self._publish("status", encode(Status(online=True, state="idle")), retain=True)
                ends.say(ends.Up(device=self._device, at=now))
                self._tell(self._courier.set_connected(True, now))
            case Disconnected(reason=reason):
                ends.say(ends.Down(device=self._device, at=now, reason=reason))
                self._tell(self._courier.set_connected(False, now))
            case Received(topic=topic, payload=payload):
                if topic == self._topic("down") or is_blob_topic(self._orders.federation, topic):
                    self._tell(self._courier.handle(payload, now))
                elif topic == self._topic("task"):
                    self._publish("report", payload)
            case _:
                return

    def _tell(self, events: Sequence[TransferEvent]) -> None:
        now, counters = time.monotonic(), self._courier.counters
        for event in events:
            match event:
                case Fetched(sha256=sha256):
                    ends.say(
                        ends.Arrived(
                            device=self._device,
                            at=now,
                            sha256=sha256,
                            blocks=counters.blocks_received,
                            duplicates=counters.duplicates,
                        )
                    )
                case Delivered(sha256=sha256):
                    ends.say(ends.Delivered(device=self._device, at=now, sha256=sha256))
                case Lost(reason=reason):
                    ends.say(ends.Gone(device=self._device, at=now, reason=reason))

    def _publish(self, kind: DeviceTopic, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self._link.publish(self._topic(kind), payload, qos=qos, retain=retain)

    def _topic(self, kind: DeviceTopic) -> str:
        return device_topic(self._orders.federation, self._device, kind)

    def _block_topic(self, transfer: str, name: str) -> str:
        return blob_topic(self._orders.federation, transfer, name)


def main() -> None:
    orders = msgspec.json.decode(sys.argv[1], type=ends.DeviceOrders)
    threads = [threading.Thread(target=DeviceEnd(orders, device).run, daemon=True) for device in orders.devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
