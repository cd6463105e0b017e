"""Bytes that travel beyond the undisturbed transfer when the link is cut, or the receiver killed, in the middle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import msgspec

from reft_edge.simulation.recovery import ends
from reft_edge.simulation.recovery.pair import Side
from reft_edge.simulation.recovery.stage import Stage
from reft_edge.wire.blocks import BLOCK_BYTES

Way = Literal["down", "up", "broadcast"]
Disturbance = Literal["cut", "kill"]

LINK_BYTES_PER_S = 1.5e6
LINK_DELAY_S = 0.02
"""12 Mbit/s, 40 ms round trip: slow enough that a cut hits a window in the middle."""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """One transfer over the device's link."""

    seconds: float
    link_bytes: int
    """In the direction of the blob, on the device's link."""
    far_bytes: int
    """In the same direction, on the coordinator's link."""


class Surplus(msgspec.Struct, frozen=True, kw_only=True):
    """A disturbed transfer beside an undisturbed one."""

    way: Way
    disturbance: Disturbance
    times: int
    blob_bytes: int
    seconds: float
    surplus_bytes: int
    """On the receiver's link."""
    surplus_blocks: float
    surplus_percent: float
    blocks_each_time: float


def measure_surplus(
    directory: Path, way: Way, disturbance: Disturbance, *, times: int, n_bytes: int, seed: int, baseline: Moved
) -> Surplus:
    """`baseline` is `move` without disturbance."""
    moved = move(directory, way, n_bytes=n_bytes, seed=seed, disturbance=disturbance, times=times)
    surplus = _receiver_bytes(way, disturbance, moved) - _receiver_bytes(way, disturbance, baseline)
    return Surplus(
        way=way,
        disturbance=disturbance,
        times=times,
        blob_bytes=n_bytes,
        seconds=moved.seconds,
        surplus_bytes=surplus,
        surplus_blocks=surplus / BLOCK_BYTES,
        surplus_percent=100.0 * surplus / n_bytes,
        blocks_each_time=surplus / BLOCK_BYTES / times,
    )


def move(
    directory: Path, way: Way, *, n_bytes: int, seed: int, disturbance: Disturbance | None = None, times: int = 0
) -> Moved:
    """Move a blob; disturb it when seeded shares of it have travelled."""
    receiver: Side = "coordinator" if way == "up" else "device"
    up = way == "up"
    rng = random.Random(seed)
    marks = sorted(rng.uniform(0.05, 0.95) * n_bytes for _ in range(times))
    with Stage(directory) as stage:
        stage.links["device"].shape(delay_s=LINK_DELAY_S, bytes_per_s=LINK_BYTES_PER_S)

        def disturb() -> None:
            if not marks or stage.travelled("device", up=up) < marks[0]:
                return
            marks.pop(0)
            if disturbance == "kill":
                stage.pair.restart(receiver)
            else:
                stage.links["device"].cut()
                stage.links["device"].restore()

        if up:
            stage.start_coordinator(pulled={stage.devices[0]: stage.put("device", n_bytes)})
            stage.start_device()
        else:
            ref = stage.put("coordinator", n_bytes)
            stage.start_coordinator(ref, broadcast=way == "broadcast")
            stage.pair.wait(ends.Up, side="coordinator")
            stage.start_device(ref, broadcast=way == "broadcast")
        began = stage.pair.wait(ends.Up, side="device")
        arrived = stage.pair.wait(ends.Arrived, side=receiver, meanwhile=disturb)
        return Moved(
            seconds=arrived.at - began.at,
            link_bytes=stage.travelled("device", up=up),
            far_bytes=stage.travelled("coordinator", up=up),
        )


def _receiver_bytes(way: Way, disturbance: Disturbance, moved: Moved) -> int:
    """What travelled on the link that was disturbed."""
    return moved.far_bytes if way == "up" and disturbance == "kill" else moved.link_bytes
