"""Transfers over a link that is slow, far and loses packets, beside what plain TCP and the link itself could do."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from reft_edge.simulation.links.tunnel import TunnelLink, TunnelShape
from reft_edge.simulation.recovery import ends
from reft_edge.simulation.recovery.coordinator_end import NAME
from reft_edge.simulation.recovery.pair import PATIENCE_S, Pair, Side
from reft_edge.simulation.recovery.stage import FEDERATION
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.endpoint import BrokerSettings

_PORT = 1883
"""Inside a namespace nobody else listens."""

_DEVICE = "device-0"

_RECEIVE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 4000)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    began = time.monotonic()
    while connection.recv(65536):
        pass
    print(time.monotonic() - began, flush=True)
"""
_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 4000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""


class LossyTransfer(msgspec.Struct, frozen=True, kw_only=True):
    """One blob over the lossy link."""

    way: Literal["down", "up"]
    congestion_control: str
    blob_bytes: int
    seconds: float
    """From the device's connection until the blob is whole."""
    plain_tcp_seconds: float
    """The same bytes in one TCP connection without any protocol, on the same kind of link."""
    ideal_seconds: float
    """At the link's rate without loss, plus one round trip."""
    efficiency: float
    """Ideal by real."""
    packet_bytes: int
    """IP packets put on the link in the direction of the blob, TCP's retransmissions included."""
    surplus_percent: float
    """Of that, beyond the blob."""
    duplicates: int
    """Blocks that arrived although they were here: what the protocol, not TCP, sent in vain."""


def measure_lossy(directory: Path, way: Literal["down", "up"], *, n_bytes: int, shape: TunnelShape) -> LossyTransfer:
    """Needs what `links.tunnel.available` asks for, and a limited rate."""
    if shape.bytes_per_s is None:
        raise ValueError("without a rate there is no ideal to compare with")
    plain_s = _plain_tcp(shape, way, n_bytes)
    with TunnelLink(shape) as link:

        def inside(side: Side, command: Sequence[str]) -> Sequence[str]:
            return link.command(0 if side == "coordinator" else 1, command)

        with Pair(directory, wrap=inside) as pair:
            seconds, duplicates = _transfer(pair, directory, link.address(0), way, n_bytes)
            packet_bytes = link.counters().n_bytes[0 if way == "down" else 1]
    ideal_s = n_bytes / shape.bytes_per_s + 2 * shape.delay_s
    return LossyTransfer(
        way=way,
        congestion_control=shape.congestion_control or "the system's",
        blob_bytes=n_bytes,
        seconds=seconds,
        plain_tcp_seconds=plain_s,
        ideal_seconds=ideal_s,
        efficiency=ideal_s / seconds,
        packet_bytes=packet_bytes,
        surplus_percent=100.0 * (packet_bytes - n_bytes) / n_bytes,
        duplicates=duplicates,
    )


def _transfer(pair: Pair, directory: Path, host: str, way: Literal["down", "up"], n_bytes: int) -> tuple[float, int]:
    """Seconds from the device's connection to the blob's arrival, and duplicate blocks."""
    settings = BrokerSettings(host=host, port=_PORT, mqtt_version="5", connect_timeout_s=60.0)
    receiver: Side = "device" if way == "down" else "coordinator"
    sender = NAME if way == "down" else _DEVICE
    ref = BlobStore(directory / sender).put(random.Random(0).randbytes(n_bytes))
    pair.start(
        ends.CoordinatorOrders(
            broker=settings,
            federation=FEDERATION,
            directory=str(directory),
            served=(ref,),
            devices=(_DEVICE,),
            pulled={} if way == "down" else {_DEVICE: ref},
            own_broker=True,
        )
    )
    pair.wait(ends.Up, side="coordinator")
    wanted = (ref,) if way == "down" else ()
    pair.start(
        ends.DeviceOrders(
            broker=settings, federation=FEDERATION, directory=str(directory), devices=(_DEVICE,), wanted=wanted
        )
    )
    began = pair.wait(ends.Up, side="device")
    arrived = pair.wait(ends.Arrived, side=receiver)
    return arrived.at - began.at, arrived.duplicates


def _plain_tcp(shape: TunnelShape, way: Literal["down", "up"], n_bytes: int) -> float:
    """Seconds between accepting a connection and its end."""
    ends_of_link: tuple[Literal[0, 1], Literal[0, 1]] = (0, 1) if way == "down" else (1, 0)
    sender, receiver = ends_of_link
    with TunnelLink(shape) as link:
        address = link.address(receiver)
        command = link.command(receiver, [sys.executable, "-c", _RECEIVE, address])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            if process.stdout is None:
                raise ValueError("the receiver's output is read")
            process.stdout.readline()
            send = [sys.executable, "-c", _SEND, address, str(n_bytes)]
            subprocess.run(link.command(sender, send), check=True, timeout=PATIENCE_S)
            return float(process.stdout.readline())
