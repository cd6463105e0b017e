"""Cores, clock and kind of processor, read from trees of files as real boards show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.profiling.system import read_system, suggested_name
from reft_edge.profiling.tree import parse_cpu_list

Plant = Callable[[dict[str, str]], Path]


def arm(cpu: int, part: str) -> str:
    return f"processor\t: {cpu}\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"


def x86(cpu: int, name: str, model: int, flags: str, *, vendor: str = "GenuineIntel", family: int = 6) -> str:
    return (
        f"processor\t: {cpu}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
        f"cpu MHz\t\t: 2599.998\nflags\t\t: {flags}\n"
    )


def clocks(kilohertz: list[int]) -> dict[str, str]:
    folder = "sys/devices/system/cpu"
    return {f"{folder}/cpu{cpu}/cpufreq/cpuinfo_max_freq": f"{khz}\n" for cpu, khz in enumerate(kilohertz)}


PI_4 = {
    "proc/cpuinfo": "\n".join(arm(cpu, "0xd08") for cpu in range(4)) + "\nHardware\t: BCM2835\nRevision\t: c03112\n",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.2\0",
    **clocks([1_500_000] * 4),
}


def test_a_raspberry_pi_has_the_papers_estimate_of_48_gflops(plant: Plant) -> None:
    system = read_system(plant(PI_4), allowed=range(4), machine="aarch64")
    assert (system.cores, system.clock_hz, system.flops_per_cycle, system.threads) == (4, 1.5e9, 8, 4)
    assert system.processor == "4 x Cortex-A72"
    assert suggested_name(system) == "raspberry-pi-4-model-b"


def test_only_the_cores_of_the_affinity_count(plant: Plant) -> None:
    assert read_system(plant(PI_4), allowed={1, 3}, machine="aarch64").cores == 2


def test_unlike_cores_keep_the_true_sum_of_operations(plant: Plant) -> None:
    cores = [arm(cpu, "0xd05" if cpu < 4 else "0xd0b") for cpu in range(8)]
    files = {"proc/cpuinfo": "\n".join(cores), **clocks([1_800_000] * 4 + [2_400_000] * 4)}
    system = read_system(plant(files), allowed=range(8), machine="aarch64")
    product = system.cores * system.clock_hz * system.flops_per_cycle
    assert product == pytest.approx(4 * 1.8e9 * 8 + 4 * 2.4e9 * 16)
    assert system.processor == "4 x Cortex-A55 + 4 x Cortex-A76"


def test_two_threads_of_one_core_count_once(plant: Plant) -> None:
    files = {"proc/cpuinfo": "\n".join(x86(cpu, "PC", 158, "fma avx2") for cpu in range(4))}
    for cpu in range(4):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 2},{cpu % 2 + 2}"
    system = read_system(plant(files), allowed=range(4), machine="x86_64")
    assert (system.cores, system.clock_hz) == (2, 2599.998e6)
    assert "4 hardware threads" in system.cores_source


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (x86(0, "Intel(R) Xeon(R) Gold 6455B", 143, "fma avx2 avx512f amx_tile"), 64),
        (x86(0, "11th Gen Intel(R) Core(TM) i7-1185G7", 140, "fma avx2 avx512f"), 32),
        (x86(0, "Intel(R) N100", 190, "fma avx2"), 16),
        (x86(0, "Intel(R) Core(TM) i5-8500", 158, "fma avx2"), 32),
        (x86(0, "AMD Ryzen 7 8845HS", 117, "fma avx2 avx512f", vendor="AuthenticAMD", family=25), 32),
        (x86(0, "AMD Ryzen 7 9700X", 68, "fma avx2 avx512f", vendor="AuthenticAMD", family=26), 64),
        (x86(0, "Intel Atom(R) x6425E", 150, "sse4_2"), 8),
        (arm(0, "0xd03"), 8),
        (arm(0, "0xd42"), 16),
        (arm(0, "0xfff"), 8),
        ("processor\t: 0\nhart\t\t: 1\nuarch\t\t: sifive,u74-mc\n", 2),
        ("", 2),
    ],
)
def test_operations_per_cycle_follow_from_the_kind_of_core(cpuinfo: str, expected: int, plant: Plant) -> None:
    system = read_system(plant({"proc/cpuinfo": cpuinfo}), allowed={0}, machine="some")
    assert system.flops_per_cycle == expected
    assert system.flops_per_cycle_source


def test_a_clock_that_nobody_tells_is_marked_as_assumed(plant: Plant) -> None:
    system = read_system(plant({"proc/cpuinfo": arm(0, "0xd08")}), allowed={0}, machine="aarch64")
    assert system.clock_source.startswith("assumed")


@pytest.mark.parametrize(
    ("text", "expected"), [("0-3,6", {0, 1, 2, 3, 6}), ("5\n", {5}), ("", set()), ("x,1-y,2", {2})]
)
def test_the_kernels_list_notation(text: str, expected: set[int]) -> None:
    assert parse_cpu_list(text) == expected


def test_this_machine_reads_as_something() -> None:
    system = read_system()
    assert system.cores > 0
    assert system.clock_hz > 0
    assert suggested_name(system)
