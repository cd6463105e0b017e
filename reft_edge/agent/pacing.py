"""Train no faster than granted: pauses after each piece of work.

Leaves the device to its main job, keeps a board without a heat sink cool, and lets a fast machine stand in for a slow
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pacer:
    """Keeps the mean speed of work at or below `flops_per_s`; None is no limit.

    What one piece took too long is not made up for by the next: the device's main job had it.
    """

    def __init__(
        self,
        flops_per_s: float | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._flops_per_s = flops_per_s
        self._clock = clock
        self._sleep = sleep
        self._began = clock()
        self._overslept_s = 0.0

    def begin(self) -> None:
        """A piece of work starts now."""
        self._began = self._clock()

    def end(self, flops: float) -> None:
        """The piece is done and took `flops` operations: pause until that many were granted since `begin`."""
        if self._flops_per_s is None:
            return
        due = self._began + flops / self._flops_per_s - self._overslept_s
        now = self._clock()
        if now >= due:
            self._overslept_s = 0.0
            return
        self._sleep(due - now)
        # Sleeping takes a little longer than asked, which adds up over thousands of short steps.
        self._overslept_s = max(0.0, self._clock() - due)
