"""How much of the processor others took while something was measured.

The upper end of many timings sees through short disturbances, not through a neighbour who computes all the time. The
kernel counts what all processes used, so the difference to what this process used is what others did.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from reft_edge.profiling.tree import ROOT, read_text

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


def read_load(root: Path = ROOT) -> Load | None:
    """The counters now; None where the kernel does not tell."""
    own = os.times()
    for line in (read_text(root / "proc/stat") or "").splitlines():
        name, *rest = line.split()
        if name == "cpu" and len(rest) >= 4 and all(word.isdigit() for word in rest):
            # user nice system idle iowait irq softirq steal; guest times after them are counted in user already
            ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in rest[:8]]
            return Load(total_s=sum(ticks), busy_s=sum(ticks) - sum(ticks[3:5]), own_s=sum(own[:4]))
    return None
