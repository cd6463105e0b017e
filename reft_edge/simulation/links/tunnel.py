"""A link that loses packets: two network namespaces, joined by a relay process that carries IP between them.

What a TCP proxy cannot emulate, because TCP would notice: loss, and with it congestion control and retransmission as
they are in the field. Programs are started inside with `command`. Needs Linux, root and TUN devices, but neither netem
nor any other kernel module; `available` says what is missing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import msgspec

from reft_edge.errors import LocalProtocolError, ResourceError
from reft_edge.simulation.children import end_with_parent
from reft_edge.simulation.links import namespaces
from reft_edge.simulation.links.tunnel_relay import ADDRESSES, Ready, RelayCounters, TunnelShape

__all__ = ["RelayCounters", "TunnelLink", "TunnelShape", "available"]

_STOP_TIMEOUT_S = 5.0


def available() -> str | None:
    """Why there can be no tunnel here; None when there can."""
    if (reason := namespaces.why_not()) is not None:
        return reason
    return None if Path("/dev/net/tun").exists() else "there is no /dev/net/tun"


class TunnelLink:
    """As a context manager; everything inside is gone at the end of the block, at the latest with this process.

    The ends are 0 and 1; `address` is where one listens, `command` is what one starts.
    """

    def __init__(self, shape: TunnelShape) -> None:
        self._shape = shape
        self._relay: subprocess.Popen[bytes] | None = None
        self._namespaces = (-1, -1)

    def start(self) -> None:
        """Raises `ResourceError` when the link cannot be made."""
        if self._relay is not None:
            raise LocalProtocolError("a tunnel is started once; make a new one")
        self._relay = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "reft_edge.simulation.links.tunnel_relay",
                msgspec.json.encode(self._shape).decode(),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=end_with_parent(),
        )
        line = _output(self._relay).readline()
        if not line:
            self.stop()
            raise ResourceError(f"no tunnel: {available() or 'the relay ended, see its message above'}")
        self._namespaces = msgspec.json.decode(line, type=Ready).namespaces

    def stop(self) -> None:
        """Idempotent. Programs inside go on, without a link."""
        relay, self._relay = self._relay, None
        if relay is None:
            return
        _input(relay).close()
        try:
            relay.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            relay.kill()
            relay.wait()
        _output(relay).close()

    def address(self, end: Literal[0, 1]) -> str:
        return ADDRESSES[end]

    def command(self, end: Literal[0, 1], command: Sequence[str]) -> list[str]:
        """`command` as it is started inside. It becomes that program, with the same process id."""
        return ["nsenter", f"--net={self.namespace(end)}", "--", *command]

    def namespace(self, end: Literal[0, 1]) -> Path:
        """The file that stands for an end's network namespace, for setns(2)."""
        if self._relay is None:
            raise LocalProtocolError("the tunnel does not run")
        return Path(f"/proc/{self._relay.pid}/fd/{self._namespaces[end]}")

    def counters(self) -> RelayCounters:
        """What was carried and lost until now."""
        if self._relay is None:
            raise LocalProtocolError("the tunnel does not run")
        _input(self._relay).write(b"\n")
        _input(self._relay).flush()
        return msgspec.json.decode(_output(self._relay).readline(), type=RelayCounters)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _input(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdin is None:
        raise LocalProtocolError("the relay has no input")
    return process.stdin


def _output(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdout is None:
        raise LocalProtocolError("the relay has no output")
    return process.stdout
