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
    return LogReader(path).read()


def follow_log(path: Path, *, wait: Callable[[], None] = lambda: time.sleep(FOLLOW_S)) -> Iterator[Event]:
    """The events of a log as they are written, from its beginning, until the run has finished.

    `wait` is called when there is nothing new. Raises `ResourceError` when the file cannot be read.
    """
    reader = LogReader(path)
    finished = False
    while True:
        events = reader.read()
        for event in events:
            finished = isinstance(event, Finished)  # more rounds may follow those that had finished
            yield event
        if not events:
            if finished:
                return
            wait()


class LogReader:
    """Reads a log bit by bit while it is written. There need be no file yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._rest = b""

    def read(self) -> list[Event]:
        """What has come since the last call; an event counts when its line is whole.

        A line that a kill cut short is passed over. Raises `ResourceError` when the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                chunk = file.read()
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise ResourceError(f"{self.path} cannot be read: {exc.strerror or exc}") from exc
        self._position += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        found = (_event_or_none(line) for line in lines)
        return [event for event in found if event is not None]


def _event_or_none(line: bytes) -> Event | None:
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
