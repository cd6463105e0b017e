"""How the board is at the moment: temperature, throttling, power.

What a device tells between rounds, when nothing computes on it. The agent's idle daemon asks, so this reads a few small
files of /sys and needs nothing but the standard library. What a board does not tell is None: most have no battery.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reft_edge.profiling.thermal import read_thermal
from reft_edge.profiling.tree import ROOT, read_int, read_text


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """A reading. None: the board does not tell."""

    temperature_celsius: float | None = None
    """Of the hottest processor sensor."""
    throttled: bool | None = None
    """Whether it slows itself down now."""
    battery_share: float | None = None
    """Charge, from 0 to 1; the mean of several batteries."""
    on_battery: bool | None = None


def read_vitals(root: Path = ROOT) -> Vitals:
    """Read what the board tells now. Takes about a millisecond."""
    thermal = read_thermal(root)
    share, on_battery = _read_power(root)
    return Vitals(
        temperature_celsius=thermal.temperature_celsius,
        throttled=thermal.throttled,
        battery_share=share,
        on_battery=on_battery,
    )


def _read_power(root: Path) -> tuple[float | None, bool | None]:
    """Charge, and whether the board lives on it (https://docs.kernel.org/power/power_supply_class.html).

    A battery of scope `Device` is a mouse's or a pen's, and says nothing about the board.
    """
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    own = [folder for folder in supplies if read_text(folder / "scope") != "Device"]
    batteries = [folder for folder in own if read_text(folder / "type") == "Battery"]
    charges = [charge for folder in batteries if (charge := read_int(folder / "capacity")) is not None]
    share = min(1.0, max(0.0, sum(charges) / len(charges) / 100)) if charges else None
    mains = [read_int(folder / "online") for folder in own if folder not in batteries]
    return share, _on_battery({read_text(folder / "status") for folder in batteries}, mains)


def _on_battery(states: set[str | None], mains: list[int | None]) -> bool | None:
    """`states` of the batteries; `mains`: for each other supply whether it is plugged in (2: over a weak charger)."""
    if any(mains):
        return False
    if "Discharging" in states:
        return True
    if states & {"Charging", "Full", "Not charging"}:
        return False
    return True if states and 0 in mains else None
