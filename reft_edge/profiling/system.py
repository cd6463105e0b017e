"""What machine this is: its name, the cores that this process may use, and their clock.

Cores are physical: two hardware threads of one core share its arithmetic units, and count once. Processor affinity
(`taskset`, cpuset groups) and a quota of processor time (`CPUQuota=`, `docker --cpus`) count.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from reft_edge.profiling.cgroups import cpu_quota
from reft_edge.profiling.processor import Core, read_cores
from reft_edge.profiling.tree import ROOT, parse_cpu_list, read_int, read_text

UNKNOWN_CLOCK_HZ = 1e9
"""Stands in where the kernel does not tell the clock; the profile says so, and planning does not use it."""


@dataclass(frozen=True, kw_only=True)
class System:
    """The hardware as this process sees it."""

    board: str
    """The board's own name, for example `Raspberry Pi 4 Model B Rev 1.4`; empty where nothing tells it."""
    processor: str
    machine: str
    """`uname -m`: aarch64, x86_64 ..."""
    cores: float
    """Physical cores that this process may use; a fraction under a quota."""
    cores_source: str
    clock_hz: float
    """Highest clock, the mean over the cores."""
    clock_source: str
    flops_per_cycle: float
    """Of one core; the mean weighted by clock where cores differ (big.LITTLE), so that the product stays true."""
    flops_per_cycle_source: str

    @property
    def threads(self) -> int:
        """How many threads to compute with: one for each whole core, at least one."""
        return max(1, int(self.cores))


def read_system(root: Path = ROOT, *, allowed: Collection[int] | None = None, machine: str | None = None) -> System:
    """Read the machine. `allowed` are the processors this process may run on, the real ones unless given."""
    machine = machine or platform.machine()
    cpus = sorted(psutil.Process().cpu_affinity() if allowed is None else allowed)
    known = read_cores(root, machine=machine)
    physical = _one_cpu_a_core(root, cpus)
    unknown = Core(cpu=-1, name=machine, flops_per_cycle=2, source="assumed: /proc/cpuinfo does not tell the core")
    cores = [known.get(cpu, unknown) for cpu in physical]
    clocks = [_clock(root, cpu) for cpu in physical]
    total = sum(hertz for hertz, _ in clocks)
    quota = cpu_quota(root)
    return System(
        board=_board(root),
        processor=_processor(cores),
        machine=machine,
        cores=float(len(physical)) if quota is None else min(len(physical), quota),
        cores_source=_cores_source(len(physical), len(cpus), quota),
        clock_hz=total / len(clocks),
        clock_source=_join(source for _, source in clocks),
        flops_per_cycle=sum(core.flops_per_cycle * hertz for core, (hertz, _) in zip(cores, clocks, strict=True))
        / total,
        flops_per_cycle_source=_join(f"{core.name}: {core.source}" for core in cores),
    )


def suggested_name(system: System) -> str:
    """A profile name out of the board's or the processor's name, never the host's: lower case, digits and dashes."""
    named = system.board or system.processor.partition(" x ")[2]
    text = re.sub(r"\((r|tm|c)\)|\brev\s+[\d.]+|\b(cpu|processor)\b.*$", " ", named.lower())
    words = re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "device"
    return words if system.board else f"{words}-{system.threads}-cores"


def _one_cpu_a_core(root: Path, cpus: Collection[int]) -> list[int]:
    """The first allowed hardware thread of every physical core."""
    chosen: list[int] = []
    taken: set[int] = set()
    for cpu in sorted(cpus):
        if cpu not in taken:
            chosen.append(cpu)
            text = read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            taken |= parse_cpu_list(text or "")
    return chosen


def _clock(root: Path, cpu: int) -> tuple[float, str]:
    """The processor's highest clock in Hz, and where that stands.

    Read here as far as the kernel tells it, because psutil tells it by frequency domain, not of which processors.
    """
    kilohertz = read_int(root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq")
    if kilohertz:
        return kilohertz * 1e3, "highest clock the kernel offers (cpufreq)"
    now = psutil.cpu_freq()
    if now is not None and now.current > 0:
        return now.current * 1e6, "clock when asked"
    return UNKNOWN_CLOCK_HZ, "assumed: the kernel does not tell the clock"


def _board(root: Path) -> str:
    """Device tree (Arm boards) or DMI (PCs). Placeholders that firmware makers leave in are dropped."""
    model = read_text(root / "proc/device-tree/model")
    if model:
        return model
    folder = root / "sys/class/dmi/id"
    words = [read_text(folder / name) or "" for name in ("sys_vendor", "product_name")]
    if any(re.search(r"o\.e\.m\.|default string|system manufacturer|not applicable", word, re.I) for word in words):
        return ""
    return " ".join(filter(None, words))


def _processor(cores: list[Core]) -> str:
    names = [core.name for core in cores]
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _cores_source(physical: int, logical: int, quota: float | None) -> str:
    text = f"{physical} physical cores in this process's affinity"
    if logical != physical:
        text += f" ({logical} hardware threads)"
    return text if quota is None or quota >= physical else f"{text}, quota of the control group: {quota:g} cores"


def _join(sources: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(sources))
