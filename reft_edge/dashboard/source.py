"""What the pages show: one federation's latest run, read from disk as the coordinator writes it.

Reading files makes the dashboard independent of the coordinator: that may be stopped, restarted or begin a new run
while a page is open. Memory grows with rounds and devices, not with time: of a device's progress in a round, and of
distilling, only the last word is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reft_edge.coordinator.event_log import LogReader
from reft_edge.coordinator.events import DeviceProgress, Distilling, Event
from reft_edge.coordinator.overview import RunOverview, overview
from reft_edge.coordinator.records import QuarantineRecord
from reft_edge.coordinator.report.record import RunReport, gather
from reft_edge.coordinator.run_files import RunFiles, find_run
from reft_edge.errors import FederationError


@dataclass(frozen=True, kw_only=True)
class Picture:
    """All that is known at one moment. `version` rises with every change.

    `overview` and `report` are None before the first run; `trouble` then says what is missing.
    """

    version: int = 0
    trouble: str = ""
    overview: RunOverview | None = None
    report: RunReport | None = None
    quarantined: tuple[QuarantineRecord, ...] = ()
    distilling: Distilling | None = None
    """While the coordinator distils."""
    seen: tuple[Event, ...] = ()
    """The events behind it all, oldest first."""


class Source:
    """Call `refresh` from one thread, and read `picture` from any."""

    def __init__(self, settings_file: Path) -> None:
        self._settings_file = settings_file
        self._reader: LogReader | None = None
        self._events = _Events()
        self._store: tuple[object, ...] = ()
        self.picture = Picture()

    def refresh(self) -> bool:
        """Read what is new; returns whether anything was. Raises `ConfigError` for settings that are wrong."""
        try:
            files = find_run(self._settings_file)
        except FederationError as exc:
            if self.picture.trouble == str(exc):
                return False
            self.picture = Picture(version=self.picture.version + 1, trouble=str(exc))
            return True
        if self._reader is None or self._reader.path != files.log:
            self._reader = LogReader(files.log)
            self._events = _Events()
        news = self._reader.read()
        store = (files.record, files.at_work, files.devices, files.quarantined)
        if not news and store == self._store:
            return False
        for event in news:
            self._events.add(event)
        self._store = store
        self.picture = self._draw(files)
        return True

    def _draw(self, files: RunFiles) -> Picture:
        seen = self._events.kept()
        state = overview(
            seen,
            record=files.record,
            at_work=files.at_work,
            devices=files.devices,
            quarantined=files.quarantined,
        )
        last = seen[-1] if seen else None
        return Picture(
            version=self.picture.version + 1,
            overview=state,
            report=gather(seen),
            quarantined=tuple(files.quarantined),
            distilling=last if isinstance(last, Distilling) and files.at_work else None,
            seen=tuple(seen),
        )


class _Events:
    """Events in order, without those that a later one has made pointless."""

    def __init__(self) -> None:
        self._kept: dict[int, Event] = {}
        self._last_word: dict[object, int] = {}
        self._serial = 0

    def add(self, event: Event) -> None:
        self._serial += 1
        self._kept[self._serial] = event
        key: object = None
        if isinstance(event, DeviceProgress) and event.state not in ("failed", "refused"):
            key = event.device
        elif isinstance(event, Distilling):
            key = Distilling
        if key is not None:
            self._kept.pop(self._last_word.get(key, 0), None)
            self._last_word[key] = self._serial

    def kept(self) -> list[Event]:
        return list(self._kept.values())
