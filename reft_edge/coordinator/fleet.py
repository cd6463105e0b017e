"""What the coordinator knows about its devices: who is there, and what they say they can do.

Pure: fed with decoded messages and with records of the store, asked for value objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from reft_edge.coordinator.records import DeviceRecord
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.messages import ProfileAnnouncement, Status

MAX_SAMPLES = 10**10
"""More than any device can read; keeps times and sizes that are computed from it within what a float can hold."""

MIN_FLOPS_PER_S = 1e3
MAX_FLOPS_PER_S = 1e16
"""From a microcontroller that emulates floating point to ten of the largest accelerators. One device that
announced more would leave all others next to nothing under the `reft` policy, which compares them with the fastest."""

LINK_LIMITS = (1.0, 1e12)
"""Bytes each second; 0 means unknown."""

DURATION_LIMITS = (0.0, 86_400.0)
"""Of a round trip and of a worker's start. Seconds."""

SIZE_LIMITS = (0.0, 2.0**53)
"""Of memory and disk. Bytes."""


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

    def disown(self, device: str) -> None:
        """Forget what a device has told; until it tells it anew, it gets no tasks."""
        self._devices[device] = msgspec.structs.replace(self[device], announcement=None, certificate="")

    def known(self) -> list[Device]:
        """Devices that have told what they can do, whether or not they are there, by name."""
        return [device for _, device in sorted(self._devices.items()) if device.announcement]

    def ready(self) -> list[Device]:
        """Devices that are online and have told what they can do, by name."""
        return [device for _, device in sorted(self._devices.items()) if device.online and device.announcement]


def unfit_reason(
    announcement: ProfileAnnouncement, *, input_shape: Sequence[int], n_outputs: int, classification: bool
) -> str:
    """Why a device cannot train this model, or cannot be what it says it is; empty when it can."""
    if announcement.training_samples < 1:
        return "it has no training samples"
    if announcement.training_samples + announcement.holdout_samples > MAX_SAMPLES:
        return f"it announces more than {MAX_SAMPLES} samples"
    if reason := _impossible(announcement.profile):
        return f"it announces {reason}"
    if announcement.input_shape and tuple(announcement.input_shape) != tuple(input_shape):
        return f"its samples have shape {announcement.input_shape}, the model takes {tuple(input_shape)}"
    if classification and announcement.n_classes is not None and announcement.n_classes > n_outputs:
        return f"its data have {announcement.n_classes} classes, the model has {n_outputs} outputs"
    return ""


def _impossible(profile: DeviceProfile) -> str:
    """The first value of a profile that no device can have; empty if all are possible.

    A profile is a device's word: what is computed from it must neither overflow nor divide by zero.
    """
    if not MIN_FLOPS_PER_S <= profile.planning_flops_per_s <= MAX_FLOPS_PER_S:
        return f"{profile.planning_flops_per_s:.3g} FLOP/s; possible is {MIN_FLOPS_PER_S:g} to {MAX_FLOPS_PER_S:g}"
    limits = {
        "granted_flops_per_s": (1.0, MAX_FLOPS_PER_S),
        "link_down_bytes_per_s": LINK_LIMITS,
        "link_up_bytes_per_s": LINK_LIMITS,
        "link_round_trip_s": DURATION_LIMITS,
        "worker_start_s": DURATION_LIMITS,
        "memory_total_bytes": SIZE_LIMITS,
        "memory_available_bytes": SIZE_LIMITS,
        "runtime_base_bytes": SIZE_LIMITS,
        "disk_free_bytes": SIZE_LIMITS,
    }
    for name, (low, high) in limits.items():
        quantity: Quantity | None = getattr(profile, name)
        if quantity is not None and quantity.value and not low <= quantity.value <= high:
            return f"{name} = {quantity.value:.3g}; possible is {low:g} to {high:g}"
    return ""
