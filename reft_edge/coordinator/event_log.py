"""Events of a run on disk, one JSON object a line, over all processes that worked on it.

What a watcher missed is here, and the run's report is made from it. A line that a kill cut short is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from reft_edge.coordinator.events import Event, Listener
from reft_edge.coordinator.report.stream import read_event
from reft_edge.errors import RemoteProtocolError, ResourceError

EVENTS_FILE = "events.jsonl"


def event_line(event: Event) -> bytes:
    """One event as a line of JSON."""
    return msgspec.json.encode(event) + b"\n"


def read_log(path: Path) -> list[Event]:
    """All events of a log; none when there is no log yet."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise ResourceError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    events: list[Event] = []
    for line in lines:
        try:
            event = read_event(line)
        except RemoteProtocolError:
            continue
        if event is not None:
            events.append(event)
    return events


class EventLog:
    """Appends to a run's log and passes events on. A context manager."""

    def __init__(self, directory: Path, listener: Listener) -> None:
        self.path = directory / EVENTS_FILE
        self._listener = listener
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Callable[[Event], None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        except OSError as exc:
            raise ResourceError(f"{self.path} cannot be written: {exc.strerror or exc}") from exc
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that a kill cut short
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _tell(self, event: Event) -> None:
        if self._file is not None:
            self._file.write(event_line(event))
            self._file.flush()
        self._listener(event)
