"""What a device's processes take, as the kernel counts it: CPU time and proportional memory of a whole process tree.

A device's processes hang below a root (`device_root`) that is not part of the device and adopts orphans. So nothing is
lost when a process ends: Linux adds the time of a child that was waited for, and of its own children, to its parent.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_ATTEMPTS = 20
"""A tree that forks and exits is read again until two readings name the same processes."""


class TreeUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes below a root take at one moment, or have taken until then."""

    processes: int
    cpu_s: float
    """Of all that run and all that have ended, in user and system mode; in steps of a clock tick for each process."""
    pss_bytes: int
    """Proportional set size: pages that several processes share are divided among them. 0 where it was not asked."""


def measure_tree(root: int, *, memory: bool = True) -> TreeUse:
    """Of the processes below `root`, which itself does not count but for the children that it has waited for."""
    pids, cpu_s = _settled_cpu(root)
    return TreeUse(processes=len(pids), cpu_s=cpu_s, pss_bytes=sum(map(_pss_bytes, pids)) if memory else 0)


def descendants(root: int) -> list[int]:
    """Process ids below `root`, without it."""
    found: list[int] = []
    waiting = [root]
    while waiting:
        children = _children(waiting.pop())
        found += children
        waiting += children
    return found


def _settled_cpu(root: int) -> tuple[list[int], float]:
    """Processes and their CPU time, from a reading during which none came or went, if there is one."""
    before = descendants(root)
    cpu_s = 0.0
    for _ in range(_ATTEMPTS):
        # Parents first: a child that ends meanwhile is then missed, and the reading repeated; never counted twice.
        cpu_s = _times(root)[1] + sum(sum(_times(pid)) for pid in before)
        after = descendants(root)
        if after == before:
            break
        before = after
    return before, cpu_s


def _children(pid: int) -> list[int]:
    """Of all threads: each has the children that it has started."""
    found: list[int] = []
    try:
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            found += map(int, (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has just ended
    return found


def _times(pid: int) -> tuple[float, float]:
    """CPU seconds of a process and of its children that it has waited for; zeros if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    # proc(5) counts from 1 with pid and name before these: utime is field 14, cutime 16.
    utime, stime, cutime, cstime = (int(word) / _TICKS_PER_S for word in fields[11:15])
    return utime + stime, cutime + cstime


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0  # a zombie has no memory
