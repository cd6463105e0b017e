"""What the pages show: one federation's latest run and its fleet, read from disk as the coordinator writes it.

Reading files makes the dashboard independent of the coordinator: that may be stopped, restarted or begin a new run
while a page is open. Events are taken in as they come; the store is read only when its files have changed. Memory grows
with rounds and devices, not with time: of a device's coming and going and of its progress in a round, of waiting and of
distilling only the last word is kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from reft_edge.coordinator.database import DATABASE_FILE, holder_of
from reft_edge.coordinator.drift import Departure, class_names, departures
from reft_edge.coordinator.event_log import LogReader
from reft_edge.coordinator.events import DeviceProgress, DeviceSeen, Distilling, Event, UpdateSeen, Waiting
from reft_edge.coordinator.overview import RunOverview, Tally
from reft_edge.coordinator.records import ConditionRecord, DeployedDevice, DeploymentRecord, QuarantineRecord
from reft_edge.coordinator.report.record import RunReport, gather
from reft_edge.coordinator.run_files import FleetFiles, RunFiles, find_latest
from reft_edge.errors import FederationError

STORE_S = 0.5
"""How often the store is read while it changes all the time, or is not there yet. Events, which say what devices do, do
not wait for it."""

UNASKED_S = 5.0
"""How often the store is read even so: two changes within a tick of the file system's clock look like one."""

OF_DEVICES = (DeviceProgress, DeviceSeen, UpdateSeen)
"""Events that come at any time, and say nothing of what the coordinator does."""


@dataclass(frozen=True)
class Picture:
    """All that is known at one moment. `version` rises with every change.

    `overview` is None where there is nothing yet; `trouble` then says what is missing.
    """

    version: int = 0
    trouble: str = ""
    overview: RunOverview | None = None
    quarantined: tuple[QuarantineRecord, ...] = ()
    conditions: tuple[ConditionRecord, ...] = ()
    departures: tuple[Departure, ...] = ()
    deployments: tuple[DeploymentRecord, ...] = ()
    """The latest first."""
    deployed: tuple[DeployedDevice, ...] = ()
    """Of the latest deployment."""
    distilling: Distilling | None = None
    """While the coordinator distils."""
    seen: tuple[Event, ...] = ()
    """The events behind it all, oldest first."""
    n_figures: int = 0
    """Rises with each event that changes the report."""

    @cached_property
    def report(self) -> RunReport:
        """The figures of the run; made when somebody looks at them."""
        return gather(self.seen)


class Source:
    """Call `refresh` from one thread, and read `picture` from any."""

    def __init__(self, settings_file: Path, *, store_s: float = STORE_S) -> None:
        self.settings_file = settings_file
        self._store_s = store_s
        self._files: FleetFiles | None = None
        self._stamp: tuple[object, ...] = ()
        self._read_at = 0.0
        self._reader: LogReader | None = None
        self._events = _Events()
        self.picture = Picture()

    def refresh(self) -> bool:
        """Read what is new; returns whether anything was. Raises `ConfigError` for settings that are wrong."""
        if self._files is None and self.picture.trouble and self._read_lately:
            return False
        try:
            files, store_is_new = self._look_at_store()
        except FederationError as exc:
            self._files, self._read_at = None, time.monotonic()
            if self.picture.trouble == str(exc):
                return False
            self.picture = Picture(version=self.picture.version + 1, trouble=str(exc))
            return True
        news = self._look_at_log(files)
        if not news and not store_is_new:
            return False
        for event in news:
            self._events.add(event)
        self.picture = self._draw(files, store_is_new=store_is_new)
        return True

    @property
    def _read_lately(self) -> bool:
        return time.monotonic() < self._read_at + self._store_s

    def _look_at_store(self) -> tuple[FleetFiles, bool]:
        """What it holds, and whether that is new."""
        before, since_s = self._files, time.monotonic() - self._read_at
        stamp = (_stamp_of(self.settings_file), *self._store_stamp())  # before reading: what changes then is seen later
        if before is not None and (since_s < self._store_s or (stamp == self._stamp and since_s < UNASKED_S)):
            return before, False
        files = find_latest(self.settings_file)
        self._files, self._read_at, self._stamp = files, time.monotonic(), stamp
        return files, files != before

    def _store_stamp(self) -> tuple[object, ...]:
        """What changes with the store, at the price of three looks at a folder."""
        if self._files is None:
            return ()
        results = self._files.results
        database = results / DATABASE_FILE
        return _stamp_of(database), _stamp_of(database.with_name(f"{DATABASE_FILE}-wal")), holder_of(results)

    def _look_at_log(self, files: FleetFiles) -> list[Event]:
        if not isinstance(files, RunFiles):
            return []
        if self._reader is None or self._reader.path != files.log:
            self._reader = LogReader(files.log)
            self._events = _Events()
        return self._reader.read()

    def _draw(self, files: FleetFiles, *, store_is_new: bool) -> Picture:
        before = self.picture
        seen = self._events.kept()
        last = next((event for event in reversed(seen) if not isinstance(event, OF_DEVICES)), None)
        departing = (
            tuple(departures(files.conditions, class_names(files.deployments))) if store_is_new else before.departures
        )
        return Picture(
            version=before.version + 1,
            overview=self._events.tally.overview(files, departing=departing),
            quarantined=tuple(files.quarantined),
            conditions=tuple(files.conditions),
            departures=departing,
            deployments=tuple(files.deployments),
            deployed=tuple(files.deployed),
            distilling=last if isinstance(last, Distilling) and files.at_work else None,
            seen=tuple(seen),
            n_figures=self._events.n_figures,
        )


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class _Events:
    """Events in order, without those that a later one has made pointless."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.n_figures = 0
        self._kept: dict[int, Event] = {}
        self._last_word: dict[object, int] = {}
        self._serial = 0

    def add(self, event: Event) -> None:
        self.tally.add(event)
        self.n_figures += not isinstance(event, DeviceProgress | DeviceSeen | Distilling | Waiting)
        self._serial += 1
        self._kept[self._serial] = event
        key = _repeats(event)
        if key is not None:
            self._kept.pop(self._last_word.get(key, 0), None)
            self._last_word[key] = self._serial

    def kept(self) -> list[Event]:
        return list(self._kept.values())


def _repeats(event: Event) -> tuple[object, ...] | None:
    """What it has in common with earlier ones that it makes pointless; None where each counts."""
    match event:
        case DeviceProgress() if event.state not in ("failed", "refused"):
            return DeviceProgress, event.device
        case DeviceSeen():  # with its profile is what a report looks for
            return DeviceSeen, event.device, bool(event.profile)
        case Distilling() | Waiting():
            return (type(event),)
    return None
