"""A star of network namespaces: one for each device, joined by a veth pair to a hub, where servers and brokers run.

What a device puts on its cable is what its interface counts: Ethernet frames with all headers, acknowledgements and
retransmissions. Segmentation is not left to the (virtual) card, so that there is a header for every 1,500 bytes, as on
a wire. IPv6 is off, because its neighbour discovery would be counted as traffic of the side that happens to run.

The namespaces have no names: each lives as long as a process in it, and first of all as its anchor, a `cat` that ends
with us, however we end. Needs Linux and root; `links.namespaces` says what is missing. Nothing inside reaches the
outside.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from reft_edge.errors import LocalProtocolError, ResourceError
from reft_edge.simulation.links import namespaces

HUB_ADDRESS = "198.18.0.1"
"""From the range for benchmarks (RFC 2544). Devices have the addresses above it."""

MAX_DEVICES = 200

_STOP_TIMEOUT_S = 5.0
_NO_IPV6 = "f=/proc/sys/net/ipv6/conf/all/disable_ipv6; [ ! -e $f ] || echo 1 > $f"


class LinkBytes(msgspec.Struct, frozen=True, kw_only=True):
    """What a device's interface has carried since it came up, as the kernel counted it."""

    down_bytes: int
    """To the device."""
    up_bytes: int
    down_packets: int
    up_packets: int


class Star:
    """As a context manager; at the end of the block the namespaces go, once the programs inside have ended."""

    def __init__(self, n_devices: int) -> None:
        if not 1 <= n_devices <= MAX_DEVICES:
            raise LocalProtocolError(f"a star has 1 to {MAX_DEVICES} devices, not {n_devices!r}")
        self._n_devices = n_devices
        self._anchors: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Raises `ResourceError` when the namespaces cannot be made."""
        try:
            for _ in range(1 + self._n_devices):
                self._anchors.append(_anchor())
            for device in range(self._n_devices):
                self._connect(device)
        except (OSError, subprocess.CalledProcessError) as exc:
            self.stop()
            said = exc.stderr.strip() if isinstance(exc, subprocess.CalledProcessError) else str(exc)
            raise ResourceError(f"no network namespaces: {namespaces.why_not() or said}") from exc

    def stop(self) -> None:
        """Idempotent."""
        anchors, self._anchors = self._anchors, []
        for anchor in anchors:
            _pipe(anchor.stdin).close()
        for anchor in anchors:
            try:
                anchor.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                anchor.kill()
                anchor.wait()
            _pipe(anchor.stdout).close()

    def at_hub(self, command: Sequence[str]) -> list[str]:
        """`command` as it is started in the hub. It becomes that program, with the same process id."""
        return _within(self._anchor_at(0), command)

    def at_device(self, device: int, command: Sequence[str]) -> list[str]:
        """`command` as it is started on a device (from 0)."""
        return _within(self._anchor_at(1 + device), command)

    def listens(self, port: int) -> bool:
        """Whether somebody listens on a TCP port in the hub."""
        rows = Path(f"/proc/{self._anchor_at(0)}/net/tcp").read_text().splitlines()[1:]
        return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows)

    def traffic(self) -> list[LinkBytes]:
        """Of each device, at the hub's end of its cable: what is sent there is received by the device."""
        text = Path(f"/proc/{self._anchor_at(0)}/net/dev").read_text()
        rows = {int(name): [int(word) for word in rest.split()] for name, rest in re.findall(r"d(\d+):(.*)", text)}
        return [
            LinkBytes(up_bytes=row[0], up_packets=row[1], down_bytes=row[8], down_packets=row[9])
            for row in (rows[device] for device in range(self._n_devices))
        ]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _connect(self, device: int) -> None:
        hub, end = self._anchor_at(0), self._anchor_at(1 + device)
        near, address = f"d{device}", _address(device)
        _run(hub, f"{_NO_IPV6}; ip link set dev lo up; ip link add {near} type veth peer name eth0 netns {end}")
        _run(end, f"{_NO_IPV6}; ip link set dev lo up; ip address add {address} peer {HUB_ADDRESS} dev eth0")
        _run(hub, f"ip address add {HUB_ADDRESS} peer {address} dev {near}; ip link set dev {near} gso_max_segs 1 up")
        _run(end, "ip link set dev eth0 gso_max_segs 1 up")

    def _anchor_at(self, place: int) -> int:
        if not self._anchors:
            raise LocalProtocolError("the star does not run")
        return self._anchors[place].pid


def _anchor() -> subprocess.Popen[bytes]:
    """A process in a network namespace of its own, until its standard input ends."""
    anchor = subprocess.Popen(
        ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        _pipe(anchor.stdin).write(b"\n")
        _pipe(anchor.stdin).flush()
        if not _pipe(anchor.stdout).readline():  # it echoes as soon as it is inside
            raise OSError("unshare was refused")
    except OSError:
        anchor.kill()
        anchor.communicate()
        raise
    return anchor


def _within(anchor: int, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net=/proc/{anchor}/ns/net", "--", *command]


def _run(anchor: int, script: str) -> None:
    subprocess.run(_within(anchor, ["sh", "-ec", script]), check=True, capture_output=True, text=True)


def _address(device: int) -> str:
    return HUB_ADDRESS.rpartition(".")[0] + f".{device + 10}"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise AssertionError("every anchor has both pipes")  # unreachable: _anchor asks for them
    return pipe
