"""Memory and processor limits of control groups count, whichever version and wherever in the hierarchy they stand."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.profiling.cgroups import cpu_quota
from reft_edge.profiling.memory import copy_bandwidth, disk_free_bytes, memory_room, resident_bytes
from reft_edge.profiling.sustained import Repetition

Plant = Callable[[dict[str, str]], Path]

MIB = 2**20
MEMINFO = (
    "MemTotal:       1048576 kB\nMemFree:         102400 kB\nMemAvailable:    819200 kB\nBuffers:  1024 kB\n"
    "Cached:  204800 kB\nShmem:  512 kB\nActive:  204800 kB\nInactive:  102400 kB\nSlab:  4096 kB\n"
)
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:1 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def v1(limit: int, used: int, cache: int) -> dict[str, str]:
    folder = "sys/fs/cgroup/memory/system.slice/agent.service"
    return {
        "proc/self/mountinfo": V1_MOUNTS,
        "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/system.slice/agent.service\n1:cpu,cpuacct:/system.slice\n",
        f"{folder}/memory.limit_in_bytes": str(limit),
        f"{folder}/memory.usage_in_bytes": str(used),
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/cpu,cpuacct/system.slice/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu,cpuacct/system.slice/cpu.cfs_period_us": "100000",
    }


def v2(limit: int, used: int, cache: int, *, at: str = "system.slice/agent.service", path: str = "") -> dict[str, str]:
    folder = f"sys/fs/cgroup/{at}".rstrip("/")
    return {
        "proc/self/mountinfo": V2_MOUNTS,
        "proc/self/cgroup": f"0::{path or '/system.slice/agent.service'}\n",
        "sys/fs/cgroup/system.slice/agent.service/memory.max": "max",
        f"{folder}/memory.max": str(limit),
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"inactive_file {cache}\n",
        f"{folder}/cpu.max": "150000 100000",
    }


@pytest.mark.parametrize(
    ("files", "available"),
    [
        (v1(300 * MIB, 100 * MIB, 40 * MIB), 240),
        (v2(300 * MIB, 100 * MIB, 40 * MIB), 240),
        (v2(300 * MIB, 100 * MIB, 40 * MIB, at="system.slice"), 240),  # the parent's limit binds the child
        (v2(300 * MIB, 100 * MIB, 40 * MIB, at="", path="/docker/0a1b"), 240),  # our path is not in the container
        (v2(300 * MIB, 100 * MIB, 40 * MIB, at="", path="/../outside"), 240),
        (v2(300 * MIB, 400 * MIB, 0), 0),
        (v1(2**62, 100 * MIB, 0), 800),  # no limit
        (v2(4000 * MIB, 0, 0), 800),  # a limit above what the machine has
        ({}, 800),
    ],
)
def test_the_tightest_limit_sets_the_memory_a_process_can_have(
    files: dict[str, str], available: int, plant: Plant
) -> None:
    room = memory_room(plant({"proc/meminfo": MEMINFO, **files}))
    assert room.available_bytes == available * MIB
    assert ("control group" in room.bound_by) == (available < 800)


@pytest.mark.parametrize("files", [v1(2**62, 0, 0), v2(2**40, 0, 0), v2(2**40, 0, 0, at="system.slice")])
def test_a_quota_of_processor_time_counts_in_cores(files: dict[str, str], plant: Plant) -> None:
    assert cpu_quota(plant(files)) == 1.5


@pytest.mark.parametrize("text", ["max 100000", "", "0 100000", "nonsense"])
def test_no_quota_is_none(text: str, plant: Plant) -> None:
    assert cpu_quota(plant({**v2(1, 1, 1), "sys/fs/cgroup/system.slice/agent.service/cpu.max": text})) is None


def test_ulimit_counts(monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (64 * MIB, 128 * MIB))
    room = memory_room(plant({"proc/meminfo": MEMINFO}))
    assert (room.available_bytes, room.total_bytes) == (64 * MIB, 1024 * MIB)


def test_this_machine(tmp_path: Path) -> None:
    room = memory_room()
    assert 0 < room.available_bytes <= room.total_bytes
    assert 0 < resident_bytes() < room.total_bytes
    assert disk_free_bytes(tmp_path / "not" / "there") > 0
    rate = copy_bandwidth(
        threads=2, available_bytes=4 * MIB, repetition=Repetition(batch_s=0.001, max_s=0.01, warm_up_s=0)
    )
    assert rate.per_s > 0
