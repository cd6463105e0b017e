"""What devices say of themselves, kept: who is there, what each can do, how it is. Of whatever process listens.

The coordinator, a deployment, a roll-back and a monitor all hear it, and what one of them has heard the next one knows.
Tasks and updates are not heard here.

What is heard is written together, when `flush` is called: a fleet that announces itself says three things a device, and
a transaction each would take a slow disk many seconds. A kill in between loses nothing for long, because devices retain
at the broker what they say here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_edge.coordinator.records import ConditionRecord, DeviceRecord, PresenceRecord

if TYPE_CHECKING:
    from reft_edge.coordinator.fleet import Fleet
    from reft_edge.coordinator.store import Store
    from reft_edge.wire.deployment import Condition
    from reft_edge.wire.messages import ProfileAnnouncement, Status


class FleetRecords:
    """Feeds the fleet and the store. Times are Unix seconds."""

    def __init__(self, store: Store, fleet: Fleet) -> None:
        self._store = store
        self._fleet = fleet
        self._online = {record.device: record.online for record in store.presence()}
        self._presence: dict[str, PresenceRecord] = {}
        """By device, as `_devices` and `_conditions`: not written yet."""
        self._devices: dict[str, DeviceRecord] = {}
        self._conditions: dict[str, ConditionRecord] = {}

    @property
    def n_waiting(self) -> int:
        """Records that are not written yet."""
        return len(self._presence) + len(self._devices) + len(self._conditions)

    def hear_status(self, device: str, status: Status, now: float) -> bool:
        """Returns whether the device came or went."""
        if self._online.get(device) != status.online:
            self._online[device] = status.online
            self._presence[device] = PresenceRecord(device=device, online=status.online, at=now)
        return self._fleet.hear_status(device, status)

    def hear_profile(self, device: str, announcement: ProfileAnnouncement, certificate: str, now: float) -> bool:
        """Returns whether it says something new."""
        if not self._fleet.hear_profile(device, announcement, certificate):
            return False
        self._devices[device] = DeviceRecord(
            device=device, announcement=announcement, seen_at=now, certificate=certificate
        )
        return True

    def hear_condition(self, device: str, condition: Condition, now: float) -> None:
        self._conditions[device] = ConditionRecord(device=device, condition=condition, seen_at=now)

    def flush(self) -> None:
        """Write what was heard, in one transaction."""
        if self.n_waiting:
            self._store.save_heard(
                devices=self._devices.values(), presence=self._presence.values(), conditions=self._conditions.values()
            )
            self._presence, self._devices, self._conditions = {}, {}, {}
