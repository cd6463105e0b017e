"""How long until a vanished peer is noticed: a device by the coordinator, a broker by the device.

A process that is killed is told by its kernel. A power cut and a stopped process say nothing: the broker waits for one
and a half keep-alives without a word (MQTT 5.0, 3.1.2.10), then publishes the device's last will.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Literal

import msgspec

from reft_edge.simulation.recovery import ends
from reft_edge.simulation.recovery.stage import Stage

DeviceEnding = Literal["kill", "power cut", "stop"]
BrokerEnding = Literal["kill", "vanish", "vanish while uploading"]

_UPLOAD_BYTES = 4_000_000
_UPLOAD_BYTES_PER_S = 500_000.0
"""Long enough that the broker vanishes in the middle."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    who: Literal["device", "broker"]
    how: str
    keepalive_s: int
    seconds: float
    """From the end until the coordinator (of a device) or the device (of a broker) knows."""


def notice_device(directory: Path, how: DeviceEnding, *, keepalive_s: int) -> Notice:
    with Stage(directory, keepalive_s=keepalive_s) as stage:
        stage.start_coordinator()
        stage.pair.wait(ends.Up, side="coordinator")
        stage.start_device()
        device = stage.devices[0]
        stage.pair.wait(ends.Up, side="coordinator", device=device)
        ended_at = time.monotonic()
        if how == "kill":
            stage.pair.send("device", signal.SIGKILL)
        elif how == "stop":
            stage.pair.send("device", signal.SIGSTOP)
        else:
            stage.links["device"].freeze()
        noticed = stage.pair.wait(ends.Down, side="coordinator", device=device)
        if how == "stop":
            stage.pair.send("device", signal.SIGCONT)
    return Notice(who="device", how=how, keepalive_s=keepalive_s, seconds=noticed.at - ended_at)


def notice_broker(directory: Path, how: BrokerEnding, *, keepalive_s: int) -> Notice:
    with Stage(directory, keepalive_s=keepalive_s) as stage:
        link = stage.links["device"]
        if how == "vanish while uploading":
            link.shape(delay_s=0.0, bytes_per_s=_UPLOAD_BYTES_PER_S)
            stage.start_coordinator(pulled={stage.devices[0]: stage.put("device", _UPLOAD_BYTES)})
        stage.start_device()
        stage.pair.wait(ends.Up, side="device")
        if how == "vanish while uploading":
            while link.bytes_up < _UPLOAD_BYTES // 4:
                time.sleep(0.01)
        ended_at = time.monotonic()
        if how == "kill":
            stage.broker.kill()
        else:
            link.freeze()
        noticed = stage.pair.wait(ends.Down, side="device")
    return Notice(who="broker", how=how, keepalive_s=keepalive_s, seconds=noticed.at - ended_at)
