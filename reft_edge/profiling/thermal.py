"""Temperature, and whether the board slows itself down, as far as the board tells.

A board that throttles computes at half its speed or less, and a profile taken then is too low; one taken cold on a
board that throttles in minutes is too high. Either way the profile should say so. psutil tells the temperature. Of
throttling three places tell, which it does not read: the Raspberry Pi's firmware, the kernel's cooling devices (Jetson,
Rockchip and other Arm boards), and Intel's throttle counters.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from reft_edge.profiling.tree import ROOT, read_int, read_text

_PI_THROTTLED_NOW = 0b1111
"""Under-voltage, clock capped, throttled, soft temperature limit: bits 0 to 3 of the firmware's `get_throttled`
(https://www.raspberrypi.com/documentation/computers/os.html#get_throttled). Bits 16 to 19 say 'since boot'."""

_CPU_SENSOR = re.compile(r"cpu|soc|x86_pkg_temp|core|tctl|package", re.I)
_CPU_COOLER = re.compile(r"cpu|processor", re.I)
_PLAUSIBLE_CELSIUS = (-40.0, 150.0)
"""Unconnected sensors tell -273, -256 or 255."""


@dataclass(frozen=True, kw_only=True)
class Thermal:
    """A reading. None: the board does not tell."""

    temperature_celsius: float | None
    throttled: bool | None
    throttle_events: int = 0
    """Intel's counters since boot; compare two readings."""

    def since(self, earlier: Thermal) -> Thermal:
        """This reading, throttled also if the counters rose after `earlier`."""
        rose = self.throttle_events > earlier.throttle_events
        return Thermal(
            temperature_celsius=self.temperature_celsius,
            throttled=True if rose else self.throttled,
            throttle_events=self.throttle_events,
        )


def read_thermal() -> Thermal:
    """Read what the board tells now."""
    throttled, events = read_throttling()
    chips = psutil.sensors_temperatures().items()
    sensors = ((f"{chip} {sensor.label}", sensor.current) for chip, several in chips for sensor in several)
    return Thermal(temperature_celsius=hottest(sensors), throttled=throttled, throttle_events=events)


def read_throttling(root: Path = ROOT) -> tuple[bool | None, int]:
    """Whether the board slows itself down now (None: it does not tell), and Intel's counters."""
    counters = [
        value
        for path in sorted((root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count"))
        if (value := read_int(path)) is not None
    ]
    told = [answer for answer in (_pi_throttled(root), _cooling(root)) if answer is not None]
    if counters:
        told.append(False)
    return any(told) if told else None, sum(counters)


def hottest(sensors: Iterable[tuple[str, float]]) -> float | None:
    """The highest of the sensors (name, °C) that are a processor's by name; of all where none is; None of none."""
    low, high = _PLAUSIBLE_CELSIUS
    plausible = [(name, celsius) for name, celsius in sensors if low < celsius < high]
    processors = [celsius for name, celsius in plausible if _CPU_SENSOR.search(name)]
    return max(processors or [celsius for _, celsius in plausible], default=None)


def _cooling(root: Path) -> bool | None:
    """Whether a cooling device that works by slowing the processor is at work."""
    states = [
        read_int(folder / "cur_state")
        for folder in sorted((root / "sys/class/thermal").glob("cooling_device*"))
        if _CPU_COOLER.search(read_text(folder / "type") or "")
    ]
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def _pi_throttled(root: Path) -> bool | None:
    """The Raspberry Pi firmware's answer: from sysfs, else from vcgencmd."""
    text = read_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if text is None and root == ROOT and "Raspberry Pi" in (read_text(root / "proc/device-tree/model") or ""):
        text = _vcgencmd()
    try:
        return bool(int(text, 16) & _PI_THROTTLED_NOW) if text else None
    except ValueError:
        return None


def _vcgencmd() -> str | None:
    """`throttled=0x50000` without its key; None where the program is missing or may not ask the firmware."""
    try:
        answer = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().partition("=")[2] if answer.returncode == 0 else None
