"""What a proxy does to the bytes of one connection: `Unchanged`, or something that knows their protocol.

Pure logic. The proxy feeds what it read, and takes what may go on now; both at any time, for either direction.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Direction(Enum):
    """Seen from the client, which connects to the proxy."""

    UP = "up"
    DOWN = "down"

    @property
    def opposite(self) -> Direction:
        return Direction.DOWN if self is Direction.UP else Direction.UP


class Conversation(Protocol):
    """One connection. Times are in seconds of any monotonic clock."""

    def feed(self, direction: Direction, data: bytes, now: float) -> None:
        """Bytes arrived. Raises `RemoteProtocolError` when they cannot be understood; the proxy hangs up then."""

    def take(self, direction: Direction, now: float) -> bytes:
        """What goes on now; empty when nothing does."""

    def end(self, direction: Direction) -> None:
        """Nothing more will be fed: what is held back in this direction goes on with the next `take`."""

    def next_release(self) -> float | None:
        """When something that is held back may go on; None when nothing is held."""


class Unchanged:
    """Bytes as they come. A `Conversation`."""

    def __init__(self) -> None:
        self._waiting = {direction: bytearray() for direction in Direction}

    def feed(self, direction: Direction, data: bytes, now: float) -> None:  # noqa: ARG002
        self._waiting[direction] += data

    def take(self, direction: Direction, now: float) -> bytes:  # noqa: ARG002
        data = bytes(self._waiting[direction])
        self._waiting[direction].clear()
        return data

    def end(self, direction: Direction) -> None:
        """Nothing is ever held back."""

    def next_release(self) -> float | None:
        return None
