"""How much of the processor others took while something was measured.

The upper end of many timings sees through short disturbances, not through a neighbour who computes all the time. The
kernel counts what all processes used, so the difference to what this process used is what others did.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

NOTABLE_SHARE = 0.1
"""Above it, a measurement is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Processor time since boot, in seconds, over all processors."""

    total_s: float
    """Idle time too."""
    busy_s: float
    """All processes, interrupts, and what a hypervisor gave to other machines."""
    own_s: float
    """This process with its threads, and its children that have ended."""

    def others_since(self, earlier: Load) -> float:
        """Share of all processors' time that others took after `earlier`, 0 to 1."""
        total = self.total_s - earlier.total_s
        others = (self.busy_s - earlier.busy_s) - (self.own_s - earlier.own_s)
        return min(1.0, max(0.0, others / total)) if total > 0 else 0.0


def read_load() -> Load:
    """The counters now."""
    own, times = os.times(), psutil.cpu_times()
    # Guests' time is not added: it is in their host's already.
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return Load(
        total_s=busy + times.idle + times.iowait,
        busy_s=busy,
        own_s=own.user + own.system + own.children_user + own.children_system,
    )
