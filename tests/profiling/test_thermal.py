"""Temperature and throttling, from what boards of different makers tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.profiling.thermal import Thermal, read_thermal

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
    assert read_thermal(plant({PI: f"{word}\n"})).throttled is throttled


@pytest.mark.parametrize(
    ("kind", "state", "throttled"),
    [("thermal-cpufreq-0", 2, True), ("Processor", 0, False), ("pwm-fan", 3, None), ("cpu-balanced", 1, True)],
)
def test_a_cooling_device_that_slows_the_processor_is_throttling_and_a_fan_is_not(
    kind: str, state: int, throttled: bool | None, plant: Plant
) -> None:
    files = {f"{THERMAL}/cooling_device0/type": kind, f"{THERMAL}/cooling_device0/cur_state": str(state)}
    assert read_thermal(plant(files)).throttled is throttled


@pytest.mark.parametrize(
    ("files", "celsius"),
    [
        ({"thermal_zone0/type": "cpu-thermal", "thermal_zone0/temp": "48312"}, 48.312),
        (
            {  # Jetson: the hottest processor zone, not the board's nor the unconnected sensor's
                "thermal_zone0/type": "AO-therm",
                "thermal_zone0/temp": "55000",
                "thermal_zone1/type": "CPU-therm",
                "thermal_zone1/temp": "41500",
                "thermal_zone2/type": "PMIC-Die",
                "thermal_zone2/temp": "-256000",
            },
            41.5,
        ),
        ({"thermal_zone0/type": "acpitz", "thermal_zone0/temp": "27800"}, 27.8),
        ({"thermal_zone0/type": "cpu-thermal"}, None),
        ({"../hwmon/hwmon1/name": "k10temp", "../hwmon/hwmon1/temp1_input": "61000", "thermal_zone0/type": "x"}, 61.0),
    ],
)
def test_the_hottest_processor_sensor_counts(
    files: dict[str, str], celsius: float | None, plant: Plant, tmp_path: Path
) -> None:
    (tmp_path / THERMAL).mkdir(parents=True)
    reading = read_thermal(plant({f"{THERMAL}/{name}": text for name, text in files.items()}))
    assert reading.temperature_celsius == celsius


def test_intels_counters_tell_throttling_between_two_readings(plant: Plant, tmp_path: Path) -> None:
    counter = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    before = read_thermal(plant({counter: "7"}))
    same = read_thermal(tmp_path).since(before)
    after = read_thermal(plant({counter: "9"})).since(before)
    assert (before.throttled, same.throttled, after.throttled) == (False, False, True)


def test_a_board_that_tells_nothing_is_unknown(tmp_path: Path) -> None:
    assert read_thermal(tmp_path) == Thermal(temperature_celsius=None, throttled=None)
