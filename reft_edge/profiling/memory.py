"""Memory: how much a training process can have, and how fast it is. Free disk too.

Available is the least of what the kernel could give without swapping, what the control groups leave,
and what `ulimit` leaves. Swap is not counted: training that swaps to an SD card takes days and wears the card out.
"""

from __future__ import annotations

import re
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from reft_edge.profiling.cgroups import tightest_memory_group
from reft_edge.profiling.sustained import Rate, Repetition, sustained_rate
from reft_edge.profiling.tree import ROOT, read_text
from reft_edge.profiling.undisturbed import own_clock

if TYPE_CHECKING:
    from reft_edge.types import Array

COPY_BYTES = 64 * 2**20
"""Size of the array that is copied: well above the last-level cache of the boards this is for (1 to 8 MiB)."""

_COPY_SHARE_OF_AVAILABLE = 1 / 8
"""On a board with little memory the copy takes at most a quarter of what is available (source and target)."""


@dataclass(frozen=True, kw_only=True)
class MemoryRoom:
    """Memory of this machine and what of it one process can have."""

    total_bytes: int
    available_bytes: int
    bound_by: str
    """What sets `available_bytes`, for a person."""


def memory_room(root: Path = ROOT) -> MemoryRoom:
    """The machine's memory within the limits of this process. `root` holds the control groups."""
    machine = psutil.virtual_memory()
    total = machine.total
    candidates = [(machine.available, "free memory of the machine")]
    group = tightest_memory_group(root)
    if group is not None:
        total = min(total, group.limit_bytes)
        candidates.append((group.left_bytes, f"limit of the control group {group.path}"))
    limit = _address_space_limit()
    if limit is not None:
        candidates.append((limit, "limit of the address space (ulimit -v)"))
    left, bound_by = min(candidates)
    return MemoryRoom(total_bytes=total, available_bytes=left, bound_by=bound_by)


def disk_free_bytes(path: Path) -> int:
    """Bytes that an ordinary user may still write on the file system that holds `path`.

    A folder that does not exist yet stands for the nearest one above it that does.
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return psutil.disk_usage(str(existing)).free


def copy_bandwidth(*, threads: int, available_bytes: int, repetition: Repetition | None = None) -> Rate:
    """Memory bandwidth in bytes/s of `threads` threads copying, reads and writes both counted.

    The kernel is STREAM's Copy (McCalpin, https://www.cs.virginia.edu/stream/); numpy's copy releases the interpreter,
    so threads copy at the same time. Writing may cost a further read of the target, which STREAM does not count either.
    """
    import numpy as np

    size = int(min(COPY_BYTES, available_bytes * _COPY_SHARE_OF_AVAILABLE)) // 4
    source, target = np.ones(size, dtype=np.float32), np.empty(size, dtype=np.float32)
    target.fill(0)  # touch every page now, so that page faults are not timed
    parts: list[tuple[Array, Array]] = list(
        zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
    )
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))

        copy()  # so that all threads have begun
        with own_clock(threads=threads) as clock:
            return sustained_rate(copy, work=2.0 * source.nbytes, repetition=repetition, clock=clock)


def resident_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss


def proportional_bytes(root: Path = ROOT) -> int:
    """Proportional set size of this process: its own memory, and its share of what it has in common with others.

    Resident memory where the kernel does not tell (before 4.14).
    """
    text = read_text(root / "proc/self/smaps_rollup") or ""
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else resident_bytes()


def _address_space_limit() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft
