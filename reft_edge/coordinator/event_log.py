"""Events of a run on disk, one JSON object a line, over all processes that worked on it.

What a watcher missed is here, and the run's report is made from it. A line that a kill cut short is passed over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from reft_edge.coordinator.events import Event, Finished, Listener
from reft_edge.coordinator.report.stream import read_event
from reft_edge.errors import RemoteProtocolError, ResourceError

EVENTS_FILE = "events.jsonl"

FOLLOW_S = 0.25
"""Pause between looks at a log that somebody follows."""


def event_line(event: Event) -> bytes:
    """One event as a line of JSON."""
    return msgspec.json.encode(event) + b"\n"


def read_log(path: Path) -> list[Event]:
    """All events of a log; none when there is no log yet. Raises `ResourceError`."""
    found = (_event_or_none(line) for line in _read_from(path, 0).splitlines())
    return [event for event in found if event is not None]


def follow_log(path: Path, *, wait: Callable[[], None] = lambda: time.sleep(FOLLOW_S)) -> Iterator[Event]:
    """The events of a log as they are written, from its beginning, until the run has finished.

    `wait` is called when there is nothing new. Raises `ResourceError` when the file cannot be read.
    """
    finished = False
    rest = b""
    position = 0
    while True:
        chunk = _read_from(path, position)
        position += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            event = _event_or_none(line)
            if event is not None:
                finished = isinstance(event, Finished)  # more rounds may follow those that had finished
                yield event
        if not chunk:
            if finished:
                return
            wait()


def _read_from(path: Path, position: int) -> bytes:
    """What stands in the file from there; nothing while there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as exc:
        raise ResourceError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _event_or_none(line: bytes) -> Event | None:
    """None also for a line that a kill cut short."""
    try:
        return read_event(line)
    except RemoteProtocolError:
        return None


class EventLog:
    """Appends to a run's log, with the time, and passes events on. A context manager.

    `clock` gives Unix time in seconds.
    """

    def __init__(self, directory: Path, listener: Listener, *, clock: Callable[[], float] = time.time) -> None:
        self.path = directory / EVENTS_FILE
        self._listener = listener
        self._clock = clock
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
        timed = msgspec.structs.replace(event, at=self._clock())
        if self._file is not None:
            self._file.write(event_line(timed))
            self._file.flush()
        self._listener(timed)
