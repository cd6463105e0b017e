"""Which processor cores there are, and how many float32 operations one of them can do in a cycle.

The paper's estimate needs operations per cycle, which no operating system tells; it follows from the core's kind. The
numbers count a fused multiply-add as 2 and are peaks: `reft-edge profile-device` shows beside them what training
really sustains. Matrix extensions (AMX, SME) are not counted, because float32 training does not use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reft_edge.profiling.tree import ROOT, read_text

_CPUFP = "cpufp, https://github.com/pigirons/cpufp/tree/master/benchmark_result"
_LLVM = "https://github.com/llvm/llvm-project/blob/main/llvm/lib/Target/AArch64"
_LIKE_A72 = "assumed: as the Cortex-A72"
_LIKE_A76 = "assumed: as the Cortex-A76, whose line it belongs to"

_ARM_CORES: Mapping[int, tuple[str, int, str]] = {
    # Part number of implementer 0x41 (Arm) -> name, float32 operations per cycle, source.
    0xD03: ("Cortex-A53", 8, f"{_CPUFP}: RK3399"),
    0xD05: ("Cortex-A55", 8, f"{_CPUFP}: RK3588"),
    0xD07: ("Cortex-A57", 8, f"LLVM's model of the core, {_LLVM}/AArch64SchedA57.td"),
    0xD08: ("Cortex-A72", 8, f"{_CPUFP}: BCM2711, RK3399"),
    0xD09: ("Cortex-A73", 8, _LIKE_A72),
    0xD0B: ("Cortex-A76", 16, f"{_CPUFP}: BCM2712, RK3588"),
    0xD0C: ("Neoverse-N1", 16, _LIKE_A76),
    0xD0D: ("Cortex-A77", 16, _LIKE_A76),
    0xD0E: ("Cortex-A76AE", 16, _LIKE_A76),
    0xD41: ("Cortex-A78", 16, _LIKE_A76),
    0xD42: ("Cortex-A78AE", 16, _LIKE_A76),
    0xD47: ("Cortex-A710", 16, _LIKE_A76),
    0xD4B: ("Cortex-A78C", 16, _LIKE_A76),
    0xD80: ("Cortex-A520", 8, f"{_CPUFP}: CIX P1"),
    0xD81: ("Cortex-A720", 16, f"{_CPUFP}: CIX P1"),
}

_INTEL_ONE_AVX512_UNIT = {102, 125, 126, 140, 141, 167}
"""Models of family 6 (Cannon, Ice, Tiger and Rocket Lake for clients) whose two 256-bit units make one of 512 bits."""
_INTEL_GRACEMONT = {190}
"""Alder Lake-N (N95, N97, N100, N200): two 128-bit units."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """One logical processor as /proc/cpuinfo describes it."""

    cpu: int
    name: str
    flops_per_cycle: int
    source: str
    """Why `flops_per_cycle` is what it is."""


def read_cores(root: Path = ROOT, *, machine: str) -> dict[int, Core]:
    """Every logical processor by number. `machine` is what `uname -m` says, for files that do not name the core."""
    cores: dict[int, Core] = {}
    for block in (read_text(root / "proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        number = fields.get("processor", "")
        if number.isdigit():
            cores[int(number)] = _core(int(number), fields, machine)
    return cores


def _core(cpu: int, fields: Mapping[str, str], machine: str) -> Core:
    if "CPU part" in fields:
        name, flops, source = _arm(fields)
    elif "flags" in fields:
        name, flops, source = _x86(fields)
    else:
        # RISC-V, MIPS and others: most boards' cores have no vector unit worth counting.
        name = fields.get("uarch") or fields.get("model name") or machine
        flops, source = 2, f"assumed: one scalar multiply-add a cycle, as nothing is known of {name!r}"
    return Core(cpu=cpu, name=name, flops_per_cycle=flops, source=source)


def _arm(fields: Mapping[str, str]) -> tuple[str, int, str]:
    implementer, part = _int(fields.get("CPU implementer", ""), 16), _int(fields["CPU part"], 16)
    if implementer == 0x41 and part in _ARM_CORES:
        return _ARM_CORES[part]
    name = f"Arm implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return name, 8, "assumed: one 128-bit multiply-add a cycle, as this core is not in the table"


def _x86(fields: Mapping[str, str]) -> tuple[str, int, str]:
    name, flags = fields.get("model name", "x86"), set(fields["flags"].split())
    family, model = _int(fields.get("cpu family", ""), 10), _int(fields.get("model", ""), 10)
    intel = fields.get("vendor_id") == "GenuineIntel"
    if "avx512f" in flags:
        # A virtual machine may show a client's model number on a server's core; AMX gives the server away.
        one_unit = intel and model in _INTEL_ONE_AVX512_UNIT and "amx_tile" not in flags
        if one_unit or (not intel and family < 26):
            return name, 32, f"AVX-512 on 256-bit units; {_CPUFP}: Ryzen 7 8845HS, Core i3-8121U"
        return name, 64, f"two 512-bit multiply-adds a cycle; {_CPUFP}: Xeon Gold 6455B, Ryzen 7 9700X"
    if "fma" in flags and "avx2" in flags:
        if (intel and model in _INTEL_GRACEMONT) or (not intel and family == 23 and model < 0x30):
            return name, 16, f"AVX2 on two 128-bit units; {_CPUFP}: N150"
        return name, 32, "two 256-bit multiply-adds a cycle (AVX2 with FMA)"
    if "avx" in flags:
        return name, 16, "assumed: a 256-bit multiplication and a 256-bit addition a cycle (AVX)"
    return name, 8, "assumed: a 128-bit multiplication and a 128-bit addition a cycle (SSE)"


def _int(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        return 0
