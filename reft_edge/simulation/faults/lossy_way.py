"""A way to the broker on which packets are lost: a proxy that listens at the far end of a tunnel.

The process at its other end is started inside a network namespace of its own, and knows no other network. The proxy
joins that to the broker outside, so it can be cut as all others can.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from reft_edge.errors import ResourceError
from reft_edge.simulation.links.tcp_proxy import TcpProxy
from reft_edge.simulation.links.tunnel import TunnelLink, TunnelShape

_CLONE_NEWNET = 0x40000000
_OWN_NAMESPACE = Path("/proc/thread-self/ns/net")


class LossyWay(TcpProxy):
    """A `TcpProxy` that is reached through a `TunnelLink`."""

    def __init__(self, target_host: str, target_port: int, shape: TunnelShape) -> None:
        super().__init__(target_host, target_port)
        self._tunnel = TunnelLink(shape)

    @property
    def host(self) -> str:
        return self._tunnel.address(0)

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` as it is started at the other end."""
        return self._tunnel.command(1, command)

    def start(self) -> None:
        self._tunnel.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        self._tunnel.stop()

    def _listen(self) -> None:
        with _inside(self._tunnel.namespace(0)):  # a socket stays in the namespace that it was made in
            super()._listen()


@contextlib.contextmanager
def _inside(namespace: Path) -> Iterator[None]:
    """This thread's network is another one for the length of the block. Raises `ResourceError`."""
    outside = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(namespace)
        try:
            yield
        finally:
            _set(outside)
    finally:
        os.close(outside)


def _enter(namespace: Path) -> None:
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set(descriptor)
    finally:
        os.close(descriptor)


def _set(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise ResourceError(f"cannot change the network namespace: {os.strerror(ctypes.get_errno())}")
