"""Does a run's faults when their moments come, and undoes them after their pauses.

No thread and no clock of its own: the play calls `notice` with what has come about and `act` with the time, often.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from reft_edge.simulation.brokers import RunningBroker
from reft_edge.simulation.faults.cast import Ice, Player
from reft_edge.simulation.faults.disk import Disk
from reft_edge.simulation.faults.progress import Sign
from reft_edge.simulation.faults.ways import Ways
from reft_edge.simulation.faults.words import COORDINATOR, LASTING, Fault, Script

Relief: TypeAlias = Callable[[], None]
"""Undoes a fault."""

_log = logging.getLogger(__name__)


class Breakable(Protocol):
    """Whose processes are broken, for example a `Cast`."""

    @property
    def broker(self) -> RunningBroker: ...

    @property
    def coordinator(self) -> Player: ...

    @property
    def agents(self) -> Mapping[str, Player]: ...

    @property
    def ice(self) -> Ice: ...

    def worker(self, device: str) -> int | None:
        """Process id of a device's worker; None when it has none."""


class Injector:
    """The faults of one run. Times are seconds of a monotonic clock; `began` is when the run did."""

    def __init__(self, script: Script, *, cast: Breakable, ways: Ways, disks: dict[str, Disk], began: float) -> None:
        self._cast = cast
        self._ways = ways
        self._disks = disks
        self._waiting = [fault for fault in script.faults if fault.kind not in LASTING and fault.moment.who != "clock"]
        self._due = [
            (began + fault.moment.delay_s, fault)
            for fault in script.faults
            if fault.kind not in LASTING and fault.moment.who == "clock"
        ]
        self._reliefs: list[tuple[float, Relief]] = []
        self.injected = [fault for fault in script.faults if fault.kind in LASTING]
        self.missed: list[Fault] = []

    def notice(self, sign: Sign, now: float) -> None:
        """Something has come about that faults may wait for."""
        for fault in [fault for fault in self._waiting if _waits_for(fault, sign)]:
            self._waiting.remove(fault)
            self._due.append((now + fault.moment.delay_s, fault))

    def act(self, now: float) -> None:
        """Do and undo what is due."""
        for at, relief in [item for item in self._reliefs if item[0] <= now]:
            self._reliefs.remove((at, relief))
            relief()
        for at, fault in [item for item in self._due if item[0] <= now]:
            self._due.remove((at, fault))
            relief_or_none = self._inflict(fault)
            _log.info("%s %s", "missed:" if relief_or_none is None else "injected:", fault)
            if relief_or_none is None:
                self.missed.append(fault)
            else:
                self.injected.append(fault)
                self._reliefs.append((now + fault.pause_s, relief_or_none))

    def end(self) -> None:
        """The run is over: undo everything; what has not happened by now does not happen."""
        for _, relief in self._reliefs:
            relief()
        self._reliefs.clear()
        self.missed += [*self._waiting, *(fault for _, fault in self._due)]
        self._waiting.clear()
        self._due.clear()

    def _inflict(self, fault: Fault) -> Relief | None:
        """Do it; returns what undoes it, or None when there was nothing to break."""
        action, _, target = fault.kind.partition("-")
        match action:
            case "kill":
                return self._kill(target, fault.device)
            case "freeze":
                return self._freeze(target, fault.device)
            case "cut":
                return self._cut(target, fault)
            case "disk":
                return self._disks[fault.device].fill() if fault.device in self._disks else None
            case _:
                return self._starve(fault.device)

    def _kill(self, target: str, device: str) -> Relief | None:
        match target:
            case "worker":
                return _nothing if (pid := self._cast.worker(device)) is not None and _kill(pid) else None
            case "broker":
                if not self._cast.broker.running:
                    return None
                self._cast.broker.kill()
                return self._cast.broker.start
            case _:
                player = self._player(target, device)
                return player.start if player.kill() else None

    def _freeze(self, target: str, device: str) -> Relief | None:
        match target:
            case "worker":
                pid = self._cast.worker(device)
            case "broker":
                pid = self._cast.broker.pid
            case _:
                pid = self._player(target, device).pid
        if pid is None or not self._cast.ice.freeze(pid):
            return None
        return lambda: self._cast.ice.thaw(pid)

    def _cut(self, target: str, fault: Fault) -> Relief:
        names = {"device": [fault.device], "coordinator": [COORDINATOR]}.get(target, list(self._ways.proxies))
        self._ways.cut(names, silent=fault.silent)
        return lambda: self._ways.restore(names)

    def _starve(self, device: str) -> Relief | None:
        """From now on the worker gets no more memory from the kernel."""
        pid = self._cast.worker(device)
        if pid is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, (1, 1))
            return _nothing
        return None

    def _player(self, target: str, device: str) -> Player:
        return self._cast.coordinator if target == "coordinator" else self._cast.agents[device]


def _waits_for(fault: Fault, sign: Sign) -> bool:
    moment = fault.moment
    return (moment.who, moment.what, moment.round) == (sign.who, sign.what, sign.round)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _nothing() -> None:
    """What undoes a fault that the federation itself must get over."""
