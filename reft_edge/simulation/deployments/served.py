"""What devices serve, read from their disks: nobody is asked for a word about it.

`Watch` sees every switch, also one that is undone at once, as long as it is asked to look often enough.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.agent.serving.slots import SERVING, InstalledModel, Slot, Slots
from reft_edge.simulation.deployments.site import Site

if TYPE_CHECKING:
    from reft_edge.coordinator.records import ExportRecord


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A device came to serve something else."""

    device: str
    version: str
    """Empty: nothing any more."""
    at: float
    """When its choice was written, Unix time."""


class Watch:
    """Call `look` often; `switches` are those since the watch began, as they were seen."""

    def __init__(self, site: Site) -> None:
        self.switches: list[Switch] = []
        self._slots = {device: slots_of(site, device) for device in site.devices}
        self._stamps = {device: slots.stamp() for device, slots in self._slots.items()}
        self._served = {device: _served(slots) for device, slots in self._slots.items()}

    def look(self) -> None:
        for device, slots in self._slots.items():
            stamp = slots.stamp()
            if stamp == self._stamps[device]:
                continue
            self._stamps[device], before = stamp, self._served[device]
            self._served[device] = version, _ = _served(slots)
            if self._served[device] != before:
                self.switches.append(Switch(device=device, version=version, at=_chosen_at(slots)))

    def devices_that_served(self, version: str) -> list[str]:
        """At any time since the watch began, as far as it was seen."""
        return sorted({switch.device for switch in self.switches if switch.version == version})


def slots_of(site: Site, device: str) -> Slots:
    return Slots(site.spool(device) / SERVING)


def served_by(site: Site, device: str) -> InstalledModel | None:
    return slots_of(site, device).current()


def versions_served(site: Site) -> dict[str, str]:
    """By device; empty where nothing is served."""
    found = {device: served_by(site, device) for device in site.devices}
    return {device: "" if current is None else current.slot.version for device, current in found.items()}


def complaints(site: Site, expected: Mapping[str, Sequence[str]]) -> list[str]:
    """About devices that serve none of the versions that they should, or one that is not what was installed."""
    found = []
    for device, versions in expected.items():
        current = served_by(site, device)
        if current is None:
            found.append(f"{device} serves nothing, expected {' or '.join(versions)}")
        elif current.slot.version not in versions:
            found.append(f"{device} serves {current.slot.version}, expected {' or '.join(versions)}")
        elif not current.verified():
            found.append(f"{device} serves a damaged {current.slot.version}")
    return found


def preinstall(site: Site, device: str, version: str, export: ExportRecord) -> None:
    """Let a device serve a float32 model before its agent is started for the first time. Raises `ReftError`."""
    content = Path(export.path).read_bytes()
    slot = Slot(
        version=version,
        deployment=f"before-{version}",
        model=export.name,
        precision="float32",
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
    )
    slots = slots_of(site, device)
    slots.install(slot, content)
    slots.switch()


def _served(slots: Slots) -> tuple[str, str]:
    """Version and deployment of what is served; empty where nothing is."""
    current = slots.current()
    return ("", "") if current is None else (current.slot.version, current.slot.deployment)


def _chosen_at(slots: Slots) -> float:
    try:
        return (slots.root / "current.json").stat().st_mtime
    except OSError:
        return 0.0
