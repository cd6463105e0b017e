"""When to say again that an update is ready."""

from __future__ import annotations

MIN_REMIND_S = 3.0
MAX_REMIND_S = 60.0
"""A finished update is announced again after this long, each time twice as long, until its receipt comes: a broker that
was restarted may have lost our words, and a coordinator may let many devices wait for their turn."""


class Reminder:
    """`due_at` is None while there is nothing to remind of. `now` is the monotonic clock in seconds."""

    def __init__(self) -> None:
        self.due_at: float | None = None
        self._wait_s = MIN_REMIND_S

    def start(self, now: float) -> None:
        """Begin, or begin anew with the shortest wait."""
        self._wait_s = MIN_REMIND_S
        self.due_at = now + self._wait_s

    def stop(self) -> None:
        self.due_at = None

    def is_due(self, now: float) -> bool:
        """Whether to remind now; the next time is later then."""
        if self.due_at is None or now < self.due_at:
            return False
        self._wait_s = min(MAX_REMIND_S, 2 * self._wait_s)
        self.due_at = now + self._wait_s
        return True
