"""One direction of an emulated link: how long bytes take, and when the next ones may enter.

A link of `bytes_per_s` sends one thing after the other, and what waits stands in a queue of `QUEUE_BYTES`; everything
then travels for `delay_s`. Pure arithmetic: `now` is an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

QUEUE_BYTES = 64 * 1024
"""What may wait in front of a slow link, as in a router. More would add delay that the link itself does not have."""


class Lane:
    """Shared by all connections of a proxy. `delay_s` and `bytes_per_s` (None: no limit) may be changed at any time."""

    def __init__(self, *, delay_s: float, bytes_per_s: float | None) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.n_bytes = 0
        """What entered since the lane was made, also if it never arrived."""
        self._free_at = 0.0

    def enter(self, n_bytes: int, now: float) -> float:
        """Put bytes on the link; returns when the last of them arrives."""
        self.n_bytes += n_bytes
        self._free_at = max(self._free_at, now)
        if self.bytes_per_s is not None:
            self._free_at += n_bytes / self.bytes_per_s
        return self._free_at + self.delay_s

    def open_at(self, now: float) -> float:
        """When the queue in front of the link has room again; at the earliest now."""
        if self.bytes_per_s is None:
            return now
        return max(now, self._free_at - QUEUE_BYTES / self.bytes_per_s)

    @property
    def piece_bytes(self) -> int:
        """How much to put on the link at once: small enough that the rate is smooth, 20 ms of a slow link."""
        return 64 * 1024 if self.bytes_per_s is None else max(1024, min(64 * 1024, int(self.bytes_per_s / 50)))
