"""How much of one peer's talk is heard: so many messages at once, so many a second after that.

Who may connect may also talk without end. What it says is bounded in size elsewhere; here in number, so that one peer
fills neither a queue that others wait in, nor a log. Pure: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Hashable

COMPLAINTS_AT_ONCE = 10
COMPLAINTS_PER_S = 1 / 60
"""Log lines about what was dropped on one topic: enough to see what is wrong, too few to fill a disk."""


class Patience:
    """A token bucket for each peer: `burst` messages at once, `per_s` a second in the long run.

    Beyond `max_peers` the one that has been silent for longest is forgotten, and may begin anew.
    """

    def __init__(self, *, burst: float, per_s: float, max_peers: int = 100_000) -> None:
        self._burst = burst
        self._per_s = per_s
        self._max_peers = max_peers
        self._left: dict[Hashable, tuple[float, float]] = {}
        """Peer -> messages that it may still send, and when that was so."""

    def takes(self, peer: Hashable, now: float) -> bool:
        """Whether one more message of `peer` is heard. `now`: seconds of a monotonic clock."""
        left, since = self._left.pop(peer, (self._burst, now))
        left = min(self._burst, left + max(0.0, now - since) * self._per_s)
        heard = left >= 1.0
        self._left[peer] = (left - 1.0 if heard else left, now)
        if len(self._left) > self._max_peers:
            del self._left[next(iter(self._left))]  # the one that has been silent for longest
        return heard


def for_complaints() -> Patience:
    """For the log: whether to write one more line about a topic."""
    return Patience(burst=COMPLAINTS_AT_ONCE, per_s=COMPLAINTS_PER_S)
