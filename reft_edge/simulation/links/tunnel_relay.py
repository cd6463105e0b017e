"""The process behind a `TunnelLink`: two network namespaces, a TUN device in each, and IP packets carried between them.

It makes the namespaces for itself and gives them no name. So the kernel removes them, devices and all, with the last
process inside, whatever ended it: there is nothing to clean up. It ends when its standard input does.

    argument  the link's shape, JSON
    output    one line, JSON, when the link is up: `Ready`; then one `RelayCounters` for every line of input
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import msgspec

from reft_edge.errors import ResourceError
from reft_edge.simulation.links.lane import Lane

ADDRESSES = ("198.18.0.1", "198.18.0.2")
"""Of the two ends. From the range for benchmarks (RFC 2544), and known to nobody outside the namespaces."""

MTU = 1500

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_DEVICE = "reft0"
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
"""Of the namespace that the reader or writer is in."""


class TunnelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the link does to packets, in each direction. Probabilities are for one packet, from 0 to 1."""

    delay_s: float = 0.0
    """One way; a round trip takes twice as long."""
    bytes_per_s: float | None = None
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Such a packet takes up to twice the delay, and others pass it."""
    congestion_control: Literal["cubic", "bbr", "reno"] | None = None
    """TCP's, at both ends; None: what this system uses."""
    seed: int = 0


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors of the two namespaces in the relay's process."""

    namespaces: tuple[int, int]


class RelayCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Of each direction: from the first end to the second, and back."""

    packets: tuple[int, int]
    n_bytes: tuple[int, int]
    """IP packets with their headers, dropped ones included: what the senders have put on the link."""
    lost: tuple[int, int]
    """By chance."""
    dropped: tuple[int, int]
    """Because the queue in front of the link was full."""


class _Way:
    """One direction: from one TUN device into the other."""

    def __init__(self, source: int, sink: int, shape: TunnelShape, number: int) -> None:
        self.source = source
        self._sink = sink
        self._shape = shape
        self._rng = random.Random(f"{shape.seed}/{number}")
        self._lane = Lane(delay_s=shape.delay_s, bytes_per_s=shape.bytes_per_s)
        self._travelling: list[tuple[float, int, bytes]] = []
        self._order = itertools.count()
        self.n_packets = self.n_bytes = self.n_lost = self.n_dropped = 0

    def read(self, now: float) -> None:
        """Put all packets that wait on the link."""
        while True:
            try:
                packet = os.read(self.source, 65536)
            except BlockingIOError:
                return
            self.n_packets += 1
            self.n_bytes += len(packet)
            lost, twice, aside = (
                self._rng.random() < p for p in (self._shape.loss, self._shape.duplicate, self._shape.reorder)
            )
            if self._lane.open_at(now) > now:
                self.n_dropped += 1
                continue
            arrival = self._lane.enter(len(packet), now)
            if aside:
                arrival += self._rng.uniform(0.0, self._shape.delay_s)
            if lost:  # on its way: it has taken its time on the link
                self.n_lost += 1
                continue
            for _ in range(1 + twice):
                heapq.heappush(self._travelling, (arrival, next(self._order), packet))

    def write(self, now: float) -> None:
        """Deliver what has arrived."""
        while self._travelling and self._travelling[0][0] <= now:
            os.write(self._sink, heapq.heappop(self._travelling)[2])

    @property
    def next_arrival(self) -> float:
        return self._travelling[0][0] if self._travelling else float("inf")


def main() -> None:
    shape = msgspec.json.decode(sys.argv[1], type=TunnelShape)
    devices, namespaces = [], []
    for own, other in (ADDRESSES, ADDRESSES[::-1]):
        _enter_new_namespace()
        if shape.congestion_control is not None:
            _set_congestion_control(shape.congestion_control)
        devices.append(_open_device(own, other))
        namespaces.append(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    _answer(Ready(namespaces=(namespaces[0], namespaces[1])))
    _relay([_Way(devices[0], devices[1], shape, 0), _Way(devices[1], devices[0], shape, 1)])


def _relay(ways: list[_Way]) -> None:
    """Carry packets until standard input ends."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    for way in ways:
        poll.register(way.source, select.POLLIN)
    while True:
        wait_s = min(way.next_arrival for way in ways) - time.monotonic()
        ready = dict(poll.poll(None if wait_s == float("inf") else max(0.0, wait_s) * 1000))
        now = time.monotonic()
        for way in ways:
            way.read(now)
            way.write(now)
        if 0 in ready:
            if not os.read(0, 4096):
                return
            _answer(_count(ways))


def _count(ways: list[_Way]) -> RelayCounters:
    return RelayCounters(
        packets=(ways[0].n_packets, ways[1].n_packets),
        n_bytes=(ways[0].n_bytes, ways[1].n_bytes),
        lost=(ways[0].n_lost, ways[1].n_lost),
        dropped=(ways[0].n_dropped, ways[1].n_dropped),
    )


def _answer(message: Ready | RelayCounters) -> None:
    os.write(1, msgspec.json.encode(message) + b"\n")


def _enter_new_namespace() -> None:
    """Python 3.11 has no `os.unshare`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise ResourceError(f"no new network namespace: {os.strerror(ctypes.get_errno())}")


def _set_congestion_control(name: str) -> None:
    try:
        _CONGESTION_CONTROL.write_text(name)
    except OSError as exc:
        raise ResourceError(f"{name}: {exc.strerror}; see net.ipv4.tcp_allowed_congestion_control") from exc


def _open_device(own: str, other: str) -> int:
    """A TUN device with an address in this process's namespace; returns its descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        ["ip", "link", "set", "dev", "lo", "up"],
        ["ip", "address", "add", own, "peer", other, "dev", _DEVICE],
        ["ip", "link", "set", "dev", _DEVICE, "mtu", str(MTU), "up"],
    ):
        subprocess.run(command, check=True)
    return descriptor


if __name__ == "__main__":
    main()
