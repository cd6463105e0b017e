"""Temperature, and whether the board slows itself down, as far as the board tells.

A board that throttles computes at half its speed or less, and a profile taken then is too low; one taken cold on a
board that throttles in minutes is too high. Either way the profile should say so. Temperatures stand in the kernel's
hwmon and thermal zones. Of throttling three places tell: the Raspberry Pi's firmware, the kernel's cooling devices
(Jetson, Rockchip and other Arm boards), and Intel's throttle counters.

Needs the standard library only: the agent's idle daemon reads this, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

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


def read_thermal(root: Path = ROOT) -> Thermal:
    """Read what the board tells now."""
    throttled, events = read_throttling(root)
    return Thermal(temperature_celsius=hottest(_sensors(root)), throttled=throttled, throttle_events=events)


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


def _sensors(root: Path) -> Iterator[tuple[str, float]]:
    """Every sensor by name, in °C: monitoring chips, and thermal zones, which some boards have instead.

    https://docs.kernel.org/hwmon/sysfs-interface.html, https://docs.kernel.org/driver-api/thermal/sysfs-api.html
    """
    for path in sorted((root / "sys/class/hwmon").glob("hwmon*/temp*_input")):
        label = read_text(path.with_name(path.name.replace("_input", "_label"))) or ""
        yield from _reading(f"{read_text(path.parent / 'name') or ''} {label}", path)
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        yield from _reading(read_text(folder / "type") or "", folder / "temp")


def _reading(name: str, path: Path) -> Iterator[tuple[str, float]]:
    """The kernel tells thousandths of a degree; a sensor that is switched off tells nothing."""
    if (thousandths := read_int(path)) is not None:
        yield name, thousandths / 1000


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
    import subprocess  # a megabyte of the daemon, on a Pi that has no file for this only

    try:
        answer = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().partition("=")[2] if answer.returncode == 0 else None
