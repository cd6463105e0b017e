"""A minimal coordinator for the agent's tests: the real wire, scripted by the test."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from reft_edge.bundle.bundle import Bundle
from reft_edge.bundle.manifest import BlobRef
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Float32
from reft_edge.wire.codecs import decode_tensors, encode_tensors
from reft_edge.wire.deployment import Condition, DeploymentMessage, decode_condition
from reft_edge.wire.messages import (
    Close,
    Done,
    ProfileAnnouncement,
    Report,
    Status,
    Task,
    TrainingPlan,
    WeightsRef,
    decode_profile,
    decode_report,
    decode_status,
    encode,
)
from reft_edge.wire.mqtt import BrokerSettings, Connected, Disconnected, MqttLink, Received
from reft_edge.wire.signing import SigningKey, VerifyKey, seal, unseal, verify
from reft_edge.wire.topics import UP_TOPICS, DeviceTopic, device_topic, parse_device_topic
from reft_edge.wire.transfer import Courier, Fetched, Lost

TIMEOUT_S = 60.0

DEAF_S = 10.0
"""Silence after which we connect again: amqtt may forget a subscription that came just as it started."""

Said = TypeVar("Said")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)


class CoordinatorSide:
    """Gives one device tasks and hears what it says. `heard` holds everything, in order.

    With a `key` it signs, and takes only what the device has signed with `device_key`.
    """

    def __init__(
        self,
        broker: BrokerSettings,
        federation: str,
        device: str,
        directory: Path,
        *,
        key: SigningKey | None = None,
        device_key: VerifyKey | None = None,
    ) -> None:
        self.store = BlobStore(directory / "coordinator")
        self.heard: list[Status | ProfileAnnouncement | Report | Condition] = []
        self.fetched: set[str] = set()
        self.certificates: list[str] = []
        """Those that came with profiles."""
        self._key, self._device_key = key, device_key
        self._federation, self._device = federation, device
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.link = MqttLink(
            broker,
            client_id=f"coordinator-{federation}",
            events=self._events,
            subscriptions=[(self._topic(t), 0 if t == "up" else 1) for t in UP_TOPICS],
        )
        self._courier = Courier(self.store, lambda data: self.link.publish(self._topic("down"), data, qos=0))
        self._heard_at = time.monotonic()
        self.link.start(wait_s=TIMEOUT_S)

    def give(self, task: Task | Close) -> None:
        self.publish(seal(self._topic("task"), encode(task), self._key))

    def roll_out(self, message: DeploymentMessage) -> None:
        self.publish(seal(self._topic("deployment"), encode(message), self._key), "deployment")

    def publish(self, payload: bytes, kind: DeviceTopic = "task", *, retain: bool = True) -> None:
        """Anything at all. Of retained messages that wait to be sent, the last replaces the others."""
        self.link.publish(self._topic(kind), payload, retain=retain)

    def publish_task(
        self, bundle: Bundle, name: str, plan: TrainingPlan, *, round_: int = 0, classes: tuple[str, ...] = ()
    ) -> Task:
        """Put the bundle's blobs into the store and make a task of them."""
        for blob in (bundle.training_graph, bundle.inference_graph):
            self.store.put(blob)
        weights = self.store.put(encode_tensors(bundle.tensors(), Float32()))
        return Task(
            task=name,
            round=round_,
            run="run-1",
            bundle=self.store.put(bundle.manifest.to_json()),
            weights=WeightsRef(blob=weights),
            plan=plan,
            deadline=time.time() + 3600,
            classes=classes,
        )

    def wait_for(self, kind: type[Said], where: Callable[[Said], bool] = lambda _: True, *, after: int = 0) -> Said:
        """The first message of a kind among those heard since `after`."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for message in self.heard[after:]:
                if isinstance(message, kind) and where(message):
                    return message
            self._step(deadline, f"{kind.__name__}; heard {self.heard[after:]}")

    def fetch(self, ref: BlobRef) -> bytes:
        """Pull a blob, which gives the device its receipt."""
        deadline = time.monotonic() + TIMEOUT_S
        for event in self._courier.fetch(ref, time.monotonic()):
            self._note(event)
        while ref.sha256 not in self.fetched:
            self._step(deadline, f"blob {ref.sha256[:8]}")
        return self.store.read(ref)

    def update_of(self, done: Done, bundle: Bundle) -> dict[str, np.ndarray]:
        data = self.fetch(done.update.blob)
        return decode_tensors(data, done.update.codec, bundle.manifest.tensors)

    def stop(self) -> None:
        self.link.stop()

    def _step(self, deadline: float, what: str) -> None:
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"waited {TIMEOUT_S} s for {what}")
        wakeup = self._courier.next_wakeup(now)
        end = min(deadline, wakeup or deadline, self._heard_at + DEAF_S)
        try:
            event = self._events.get(timeout=max(0.0, end - now))
            self._heard_at = time.monotonic()
        except queue.Empty:
            event = None
            if time.monotonic() >= self._heard_at + DEAF_S:
                self.link.reconnect("says nothing")
                self._heard_at = time.monotonic()
        now = time.monotonic()
        noted = self._courier.tick(now)
        match event:
            case Connected():
                noted += self._courier.set_connected(True, now)
            case Disconnected():
                noted += self._courier.set_connected(False, now)
            case Received():
                noted += self._received(event, now)
        for item in noted:
            self._note(item)

    def _received(self, message: Received, now: float) -> list[Any]:
        kind = parse_device_topic(self._federation, message.topic).topic
        if kind == "up":
            return self._courier.handle(message.payload, now)
        decoders: dict[DeviceTopic, Callable[[bytes], Any]] = {
            "status": decode_status,
            "profile": decode_profile,
            "report": decode_report,
            "condition": decode_condition,
        }
        sealed = unseal(message.topic, message.payload)
        if self._device_key is not None and kind != "status":
            verify(message.topic, sealed, self._device_key)
        if kind == "profile":
            self.certificates.append(sealed.certificate)
        self.heard.append(decoders[kind](sealed.message))
        return []

    def _note(self, event: Any) -> None:
        if isinstance(event, Lost):
            raise RuntimeError(f"lost {event.sha256[:8]}: {event.reason}")
        if isinstance(event, Fetched):
            self.fetched.add(event.sha256)

    def _topic(self, kind: Any) -> str:
        return device_topic(self._federation, self._device, kind)
