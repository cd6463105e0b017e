"""How a board is, from the few files in which boards of different makers tell it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.profiling.vitals import Vitals, read_vitals

Plant = Callable[[dict[str, str]], Path]

POWER = "sys/class/power_supply"
HWMON = "sys/class/hwmon"
ZONES = "sys/class/thermal"


def supply(name: str, **files: str) -> dict[str, str]:
    return {f"{POWER}/{name}/{key}": f"{text}\n" for key, text in files.items()}


def battery(name: str = "BAT0", *, capacity: str = "80", status: str = "Unknown", **more: str) -> dict[str, str]:
    return supply(name, type="Battery", capacity=capacity, status=status, **more)


MAINS = supply("AC", type="Mains", online="1")
PULLED = supply("AC", type="Mains", online="0")


@pytest.mark.parametrize(
    ("files", "celsius"),
    [
        ({f"{HWMON}/hwmon0/name": "cpu_thermal", f"{HWMON}/hwmon0/temp1_input": "48312"}, 48.312),
        ({f"{ZONES}/thermal_zone0/type": "CPU-therm", f"{ZONES}/thermal_zone0/temp": "41500"}, 41.5),
        (
            {
                f"{HWMON}/hwmon0/name": "nvme",
                f"{HWMON}/hwmon0/temp1_input": "70000",
                f"{HWMON}/hwmon0/temp1_label": "Composite",
                f"{ZONES}/thermal_zone3/type": "soc-thermal",
                f"{ZONES}/thermal_zone3/temp": "52000",
            },
            52.0,
        ),
        (
            {
                f"{HWMON}/hwmon1/name": "coretemp",
                f"{HWMON}/hwmon1/temp2_input": "58000",
                f"{HWMON}/hwmon1/temp3_input": "61000",
                f"{HWMON}/hwmon1/temp3_label": "Core 1",
            },
            61.0,
        ),
        ({f"{HWMON}/hwmon0/name": "cpu_thermal", f"{HWMON}/hwmon0/temp1_input": ""}, None),
        ({f"{ZONES}/thermal_zone0/type": "PMIC-Die", f"{ZONES}/thermal_zone0/temp": "-256000"}, None),
    ],
    ids=["Pi", "Jetson", "a disk is no processor", "cores", "switched off", "unconnected"],
)
def test_the_temperature_is_the_processors(files: dict[str, str], celsius: float | None, plant: Plant) -> None:
    assert read_vitals(plant(files)).temperature_celsius == celsius


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (battery() | PULLED, (0.8, True)),
        (battery() | MAINS, (0.8, False)),
        (battery(status="Discharging"), (0.8, True)),
        (battery(status="Discharging") | MAINS, (0.8, False)),
        (battery(status="Charging") | PULLED, (0.8, False)),
        (battery(), (0.8, None)),
        (battery(capacity="104", status="Full"), (1.0, False)),
        (battery() | battery("BAT1", capacity="40") | PULLED, (0.6, True)),
        (battery("mouse", scope="Device", status="Discharging"), (None, None)),
        (MAINS, (None, False)),
        (PULLED, (None, None)),
    ],
    ids=[
        "mains pulled",
        "mains",
        "discharging",
        "mains but draining",
        "charging by a way that tells nothing",
        "nobody tells",
        "a gauge that says more than all",
        "two",
        "a mouse's",
        "mains only",
        "a free socket, no battery",
    ],
)
def test_power_is_the_boards_own(
    files: dict[str, str], expected: tuple[float | None, bool | None], plant: Plant
) -> None:
    vitals = read_vitals(plant(files))
    assert (vitals.battery_share, vitals.on_battery) == expected


def test_throttling_is_what_the_profile_goes_by(plant: Plant) -> None:
    firmware = "sys/devices/platform/soc/soc:firmware/get_throttled"
    assert read_vitals(plant({firmware: "50005\n"})).throttled is True


def test_a_board_that_tells_nothing_is_unknown(tmp_path: Path) -> None:
    assert read_vitals(tmp_path) == Vitals()


def test_the_idle_daemon_may_ask_without_growing() -> None:
    code = "import sys; from reft_edge.profiling.vitals import read_vitals; read_vitals(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"psutil", "numpy", "subprocess"} & set(loaded)
