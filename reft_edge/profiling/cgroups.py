"""What the control groups of this process allow: memory and processor time, version 1 and version 2.

A container or a systemd unit (`MemoryMax=`, `CPUQuota=`) sees the whole machine in /proc, and is killed for taking it.
A limit may stand on any group from ours up to the root of the hierarchy, so all of them are looked at. Where a
container shows only its own group under the mount, our path does not exist there, and the mount itself is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reft_edge.profiling.tree import ROOT, read_int, read_text

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes 'no limit' as the largest page-aligned 63-bit number."""


@dataclass(frozen=True, kw_only=True)
class MemoryGroup:
    """One group with a limit."""

    path: str
    limit_bytes: int
    used_bytes: int
    """Without file cache that the kernel gives back under pressure."""

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def tightest_memory_group(root: Path = ROOT) -> MemoryGroup | None:
    """The group that leaves this process the least memory; None without any limit."""
    groups = [group for folder in _folders(root, "memory") if (group := _memory_group(folder, root)) is not None]
    return min(groups, key=lambda group: group.left_bytes, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processor time allowed, in cores (1.5: one and a half); None without any limit."""
    quotas = [quota for folder in _folders(root, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _memory_group(folder: Path, root: Path) -> MemoryGroup | None:
    limit = read_int(folder / "memory.max")  # version 2; the text `max` is no limit
    used = read_int(folder / "memory.current")
    cache_key = "inactive_file"
    if limit is None:
        limit = read_int(folder / "memory.limit_in_bytes")
        used = read_int(folder / "memory.usage_in_bytes")
        cache_key = "total_inactive_file"
    if limit is None or limit >= _NO_LIMIT_BYTES:
        return None
    cache = _stat(folder / "memory.stat").get(cache_key, 0)
    path = "/" + str(folder.relative_to(root))
    return MemoryGroup(path=path, limit_bytes=limit, used_bytes=max(0, (used or 0) - cache))


def _quota(folder: Path) -> float | None:
    quota, period = read_int(folder / "cpu.cfs_quota_us"), read_int(folder / "cpu.cfs_period_us")
    words = (read_text(folder / "cpu.max") or "").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        quota, period = int(words[0]), int(words[1])
    return quota / period if quota is not None and period and quota > 0 else None


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Our group's folder and all above it, in every mounted hierarchy that has the controller."""
    mounts = _mounts(root)
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        name = "" if number == "0" else controller
        if (number == "0" or controller in controllers.split(",")) and name in mounts:
            mount = root / mounts[name].lstrip("/")
            folder = mount / path.lstrip("/")
            if not folder.is_dir() or ".." in Path(path).parts:
                folder = mount
            yield folder
            while folder != mount:
                folder = folder.parent
                yield folder


def _mounts(root: Path) -> dict[str, str]:
    """Mount point of each version 1 controller by its name, and of version 2 under the empty name."""
    mounts: dict[str, str] = {}
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            mounts[""] = fields[4]
        elif kind[0] == "cgroup":
            for option in kind[2].split(","):
                mounts.setdefault(option, fields[4])
    return mounts


def _stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in (read_text(path) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
