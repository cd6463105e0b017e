"""Where a federation is, read from the files that its processes write: no fault can keep us from seeing it.

The coordinator's events come from its event log, a device's phase from the state in its spool. Both are looked at a
hundred times a second; what comes and goes faster is not seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from reft_edge.coordinator.event_log import EVENTS_FILE
from reft_edge.coordinator.events import Finished, UpdateSeen
from reft_edge.coordinator.report.stream import read_event
from reft_edge.errors import RemoteProtocolError
from reft_edge.simulation.faults.site import results_of, spool_of
from reft_edge.simulation.faults.words import COORDINATOR


class Sign(NamedTuple):
    """Somebody has come to something; `Moment` waits for one of these."""

    who: str
    what: str
    round: int


class _Task(msgspec.Struct):
    round: int = 0


class _State(msgspec.Struct):
    """As much of a session's state as is of interest here."""

    phase: str = ""
    task: _Task | None = None


class Progress:
    """Call `look` often. `finished` once the coordinator has said so."""

    def __init__(self, directory: Path, devices: Sequence[str]) -> None:
        self.finished = False
        self._results = results_of(directory)
        self._states = {device: spool_of(directory, device) / "state.json" for device in devices}
        self._seen: dict[str, Sign] = {}
        self._offset = 0
        self._updates: defaultdict[int, int] = defaultdict(int)

    def look(self) -> list[Sign]:
        """What is new since the last look."""
        return [*self._events(), *self._phases()]

    def _events(self) -> list[Sign]:
        signs = []
        for line in self._new_lines():
            try:
                event = read_event(line)
            except RemoteProtocolError:
                continue  # a kill cut it short
            if isinstance(event, Finished):
                self.finished = True
            number = getattr(event, "round", None)
            if event is None or number is None:
                continue
            what = str(event.__struct_config__.tag)
            if isinstance(event, UpdateSeen):
                self._updates[number] += 1
                what = f"{what} {self._updates[number]}"
            signs.append(Sign(COORDINATOR, what, number))
        return signs

    def _new_lines(self) -> list[bytes]:
        path = next(self._results.glob(f"*/{EVENTS_FILE}"), None)
        if path is None:
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole, newline, _ = data.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.splitlines()

    def _phases(self) -> list[Sign]:
        signs = []
        for device, path in self._states.items():
            try:
                state = msgspec.json.decode(path.read_bytes(), type=_State)
            except (OSError, msgspec.MsgspecError):
                continue
            sign = Sign(device, state.phase, state.task.round if state.task else 0)
            if self._seen.get(device) != sign:
                self._seen[device] = sign
                signs.append(sign)
        return signs
