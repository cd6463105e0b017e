"""Whether the broker still brings us what devices say: a word to ourselves, now and then, must come back.

Nobody notices otherwise. Mosquitto 2.0.11 throws away packets when 500 wait for one client, which a single device that
floods its topics can bring about. Those at QoS 1 stay in flight for ever in its books, and after as many as it sends
without acknowledgement nothing more comes at QoS 1: no report, no status, until the next connection.

Pure: `now` is an argument, in seconds of a monotonic clock.
"""

from __future__ import annotations

SAY_EVERY_S = 30.0

COMES_WITHIN_S = 180.0
"""As long as a full queue of 8 MiB takes at 400 kbit/s: a slow link must not be taken for a deaf one."""


class Echo:
    """Ask `is_due` when `due_at` has passed, and say a word if so; ask `is_lost` then, too."""

    def __init__(self) -> None:
        self.due_at: float | None = None
        """None while there is no connection."""
        self._waits_since: float | None = None

    def connected(self, now: float) -> None:
        self.due_at, self._waits_since = now, None

    def disconnected(self) -> None:
        self.due_at = self._waits_since = None

    def heard(self) -> None:
        """Something came at QoS 1, our own word or another's."""
        self._waits_since = None

    def is_due(self, now: float) -> bool:
        """Whether to say a word now."""
        if self.due_at is None or now < self.due_at:
            return False
        self.due_at = now + SAY_EVERY_S
        self._waits_since = now if self._waits_since is None else self._waits_since
        return True

    def is_lost(self, now: float) -> bool:
        """Whether nothing has come back for too long."""
        return self._waits_since is not None and now - self._waits_since > COMES_WITHIN_S
