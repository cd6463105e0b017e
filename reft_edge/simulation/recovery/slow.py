"""A consumer ten times slower than its publisher, at the broker's ordinary limits: what is lost, and what it costs.

`messages_dropped` is Mosquitto's own count (`$SYS/broker/publish/messages/dropped`), brought up to date every 10 s.
"""

from __future__ import annotations

import queue
import re
import time
from pathlib import Path
from typing import Literal

import msgspec

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import FederationError
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.simulation.recovery import ends
from reft_edge.simulation.recovery.stage import Stage
from reft_edge.wire.mqtt import Event, MqttLink, Received

SLOWER = 10.0
DROPPED_TOPIC = "$SYS/broker/publish/messages/dropped"
_SYS_INTERVAL_S = 10.0


class SlowConsumer(msgspec.Struct, frozen=True, kw_only=True):
    """Blobs from fast publishers to one slow consumer."""

    way: Literal["pull", "broadcast", "upload"]
    publishers: int
    blob_bytes: int
    """Of all blobs together."""
    consumer_bytes_per_s: float
    seconds: float
    ideal_seconds: float
    blobs_lost: int
    messages_dropped: int
    surplus_percent: float
    """On the consumer's link, beyond the blobs."""
    broker_growth_bytes: int
    """The most that the broker's resident memory grew."""


def measure_slow_device(
    directory: Path, way: Literal["pull", "broadcast"], *, n_bytes: int, bytes_per_s: float
) -> SlowConsumer:
    """One device downloads over a link of `bytes_per_s`; the coordinator's is ten times as fast."""
    broadcast = way == "broadcast"
    with Stage(directory) as stage:
        before = _resident_bytes(stage.broker, "VmRSS")
        stage.links["device"].shape(delay_s=0.0, bytes_per_s=bytes_per_s)
        stage.links["coordinator"].shape(delay_s=0.0, bytes_per_s=SLOWER * bytes_per_s)
        ref = stage.put("coordinator", n_bytes)
        stage.start_coordinator(ref, broadcast=broadcast)
        stage.pair.wait(ends.Up, side="coordinator")
        stage.start_device(ref, broadcast=broadcast)
        began = stage.pair.wait(ends.Up, side="device").at
        ended = stage.pair.wait(ends.Arrived, side="device").at
        return _result(
            stage, way, [ref], before, ended - began, bytes_per_s, stage.travelled("device", up=False), publishers=1
        )


def measure_slow_coordinator(directory: Path, *, devices: int, n_bytes: int, bytes_per_s: float) -> SlowConsumer:
    """`devices` upload at once to a coordinator with a link of `bytes_per_s`; theirs is ten times as fast."""
    with Stage(directory, devices=devices) as stage:
        before = _resident_bytes(stage.broker, "VmRSS")
        stage.links["coordinator"].shape(delay_s=0.0, bytes_per_s=bytes_per_s)
        stage.links["device"].shape(delay_s=0.0, bytes_per_s=SLOWER * bytes_per_s)
        pulled = {name: stage.put("device", n_bytes, device=number) for number, name in enumerate(stage.devices)}
        stage.start_device()
        for _ in stage.devices:
            stage.pair.wait(ends.Up, side="device")
        stage.start_coordinator(pulled=pulled)
        began = stage.pair.wait(ends.Up, side="coordinator", device="coordinator").at
        arrived = [stage.pair.wait(ends.Arrived, side="coordinator") for _ in pulled]
        return _result(
            stage,
            "upload",
            list(pulled.values()),
            before,
            arrived[-1].at - began,
            bytes_per_s,
            stage.travelled("coordinator", up=True),
            publishers=devices,
            lost=len(pulled) - len({word.sha256 for word in arrived}),
        )


def _result(
    stage: Stage,
    way: Literal["pull", "broadcast", "upload"],
    blobs: list[BlobRef],
    before: int,
    seconds: float,
    bytes_per_s: float,
    travelled: int,
    *,
    publishers: int,
    lost: int = 0,
) -> SlowConsumer:
    n_bytes = sum(blob.size_bytes for blob in blobs)
    return SlowConsumer(
        way=way,
        publishers=publishers,
        blob_bytes=n_bytes,
        consumer_bytes_per_s=bytes_per_s,
        seconds=seconds,
        ideal_seconds=n_bytes / bytes_per_s,
        blobs_lost=lost,
        surplus_percent=100.0 * (travelled - n_bytes) / n_bytes,
        broker_growth_bytes=_resident_bytes(stage.broker, "VmHWM") - before,
        messages_dropped=_messages_dropped(stage.broker),
    )


def _resident_bytes(broker: RunningBroker, key: Literal["VmRSS", "VmHWM"]) -> int:
    """Of the broker's process, now or at most."""
    text = Path(f"/proc/{broker.pid}/status").read_text(encoding="ascii")
    found = re.search(rf"^{key}:\s+(\d+) kB", text, flags=re.MULTILINE)
    if found is None:
        raise FederationError(f"the system does not say {key} of the broker")
    return int(found[1]) * 1024


def _messages_dropped(broker: RunningBroker) -> int:
    """What Mosquitto has dropped since it was started. Takes until it counts again."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    link = MqttLink(
        broker.settings, client_id="count", events=events, subscriptions=[(DROPPED_TOPIC, 0)], persistent=False
    )
    link.start(wait_s=_SYS_INTERVAL_S)
    end = time.monotonic() + 1.5 * _SYS_INTERVAL_S
    dropped = 0  # it says nothing while the count does not change
    try:
        while (left := end - time.monotonic()) > 0:
            event = events.get(timeout=left)
            if isinstance(event, Received):
                dropped = int(event.payload)
    except queue.Empty:
        return dropped
    finally:
        link.stop()
    return dropped
