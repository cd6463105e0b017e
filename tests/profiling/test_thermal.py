"""Temperature and throttling, from what boards of different makers tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.profiling.thermal import Thermal, hottest, read_thermal, read_throttling

Plant = Callable[[dict[str, str]], Path]

PI = "sys/devices/platform/soc/soc:firmware/get_throttled"
THERMAL = "sys/class/thermal"


@pytest.mark.parametrize(
    ("word", "throttled"),
    [("0", False), ("0x50000", False), ("0x50005", True), ("8", True), ("nonsense", None), ("", None)],
)
def test_a_raspberry_pi_is_throttled_when_it_says_now_not_when_it_says_once(
    word: str, throttled: bool | None, plant: Plant
) -> None:
    assert read_throttling(plant({PI: f"{word}\n"}))[0] is throttled


@pytest.mark.parametrize(
    ("kind", "state", "throttled"),
    [("thermal-cpufreq-0", 2, True), ("Processor", 0, False), ("pwm-fan", 3, None), ("cpu-balanced", 1, True)],
)
def test_a_cooling_device_that_slows_the_processor_is_throttling_and_a_fan_is_not(
    kind: str, state: int, throttled: bool | None, plant: Plant
) -> None:
    files = {f"{THERMAL}/cooling_device0/type": kind, f"{THERMAL}/cooling_device0/cur_state": str(state)}
    assert read_throttling(plant(files))[0] is throttled


@pytest.mark.parametrize(
    ("sensors", "celsius"),
    [
        ([("cpu_thermal ", 48.312)], 48.312),
        # Jetson: the hottest processor zone, not the board's nor the unconnected sensor's
        ([("AO-therm ", 55.0), ("CPU-therm ", 41.5), ("PMIC-Die ", -256.0)], 41.5),
        ([("acpitz ", 27.8)], 27.8),
        ([("nvme Composite", 70.0), ("coretemp Core 0", 58.0), ("coretemp Core 1", 61.0)], 61.0),
        ([("k10temp Tctl", 61.0), ("x ", float("nan"))], 61.0),
        ([], None),
    ],
)
def test_the_hottest_processor_sensor_counts(sensors: list[tuple[str, float]], celsius: float | None) -> None:
    assert hottest(sensors) == celsius


def test_intels_counters_tell_throttling_between_two_readings(plant: Plant) -> None:
    counter = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    readings = []
    for count in ("7", "7", "9"):
        throttled, events = read_throttling(plant({counter: count}))
        readings.append(Thermal(temperature_celsius=None, throttled=throttled, throttle_events=events))
    before, same, after = readings
    assert (before.throttled, same.since(before).throttled, after.since(before).throttled) == (False, False, True)


def test_a_board_that_tells_nothing_is_unknown(tmp_path: Path) -> None:
    assert read_throttling(tmp_path) == (None, 0)


def test_this_machine_can_be_asked() -> None:
    celsius = read_thermal().temperature_celsius
    assert celsius is None or -40 < celsius < 150
