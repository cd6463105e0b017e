"""What the coordinator knows about its devices: who is there, and what they say they can do.

Pure: fed with decoded messages and with records of the store, asked for value objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from reft_edge.coordinator.records import DeviceRecord
from reft_edge.wire.messages import ProfileAnnouncement, Status


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device as it is known now."""

    device: str
    online: bool = False
    state: str = "offline"
    announcement: ProfileAnnouncement | None = None
    """The last one, perhaps from before this process."""
    certificate: str = ""
    """PEM, as it came with the announcement."""


class Fleet:
    """All devices that were ever heard of."""

    def __init__(self, known: Iterable[DeviceRecord] = ()) -> None:
        self._devices = {
            record.device: Device(
                device=record.device, announcement=record.announcement, certificate=record.certificate
            )
            for record in known
        }

    def __getitem__(self, device: str) -> Device:
        return self._devices.get(device, Device(device=device))

    def hear_status(self, device: str, status: Status) -> bool:
        """Returns whether the device came or went."""
        before = self[device]
        state = status.state if status.online else "offline"
        self._devices[device] = msgspec.structs.replace(before, online=status.online, state=state)
        return before.online != status.online

    def hear_profile(self, device: str, announcement: ProfileAnnouncement, certificate: str = "") -> bool:
        """Returns whether it says something new, or comes with another certificate."""
        before = self[device]
        after = msgspec.structs.replace(before, announcement=announcement, certificate=certificate)
        self._devices[device] = after
        return before != after

    def ready(self) -> list[Device]:
        """Devices that are online and have told what they can do, by name."""
        return [device for _, device in sorted(self._devices.items()) if device.online and device.announcement]


def unfit_reason(
    announcement: ProfileAnnouncement, *, input_shape: Sequence[int], n_outputs: int, classification: bool
) -> str:
    """Why a device's data cannot train this model; empty when it can."""
    if announcement.training_samples < 1:
        return "it has no training samples"
    if announcement.input_shape and tuple(announcement.input_shape) != tuple(input_shape):
        return f"its samples have shape {announcement.input_shape}, the model takes {tuple(input_shape)}"
    if classification and announcement.n_classes is not None and announcement.n_classes > n_outputs:
        return f"its data have {announcement.n_classes} classes, the model has {n_outputs} outputs"
    return ""
