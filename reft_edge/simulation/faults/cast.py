"""The processes of one federation: broker, coordinator and agents, which die and are started again.

A process that was killed comes back when it is told to, with the same command and the same files, as under a service
manager. One that ends by itself is not started again: that must not happen, and is found afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import reft_edge
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.simulation.children import Child, Children
from reft_edge.simulation.faults.ways import Ways
from reft_edge.simulation.faults.words import COORDINATOR
from reft_edge.simulation.run_directory import FEDERATION_FILE, log_path

_WORKER_MODULE = b"reft_edge.agent.worker"


class Player:
    """One process that can be killed and started again, stopped and continued."""

    def __init__(self, name: str, command: Sequence[str], *, directory: Path, children: Children) -> None:
        self.name = name
        self._command = command
        self._directory = directory
        self._children = children
        self._child: Child | None = None
        self.killed = False
        """Whether it was ended by us and is to come back."""

    def start(self) -> None:
        packages = [str(Path(reft_edge.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        self.killed = False
        self._child = self._children.start(
            self.name,
            self._command,
            log_path=log_path(self._directory, self.name),
            directory=self._directory,
            environment={"PYTHONPATH": os.pathsep.join(filter(None, packages)), "OMP_NUM_THREADS": "1"},
        )

    @property
    def pid(self) -> int | None:
        """None unless it runs (or is stopped)."""
        return self._child.process.pid if self._child is not None and self._child.status is None else None

    @property
    def status(self) -> int | None:
        """How it ended; None while it runs."""
        return None if self._child is None else self._child.status

    def kill(self) -> bool:
        """End it as a power cut would; False when there is nothing to kill."""
        if self._child is None or self.pid is None:
            return False
        self.killed = True
        os.kill(self._child.process.pid, signal.SIGKILL)
        self._child.process.wait()
        return True

    def stop(self, timeout_s: float) -> int | None:
        """Ask it to end; how it did, or None when it does not within `timeout_s`."""
        if self._child is None:
            return None
        self._child.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._child.process.wait(timeout_s)
        return None

    def obituary(self) -> str:
        return "" if self._child is None else self._child.obituary()


class Ice:
    """Processes that were stopped and shall go on; only these do."""

    def __init__(self) -> None:
        self._frozen: set[int] = set()

    def freeze(self, pid: int) -> bool:
        """SIGSTOP; False when the process is gone or was stopped already."""
        if pid in self._frozen or not _send(pid, signal.SIGSTOP):
            return False
        self._frozen.add(pid)
        return True

    def thaw(self, pid: int) -> None:
        """SIGCONT, if it was stopped by us and still lives."""
        if pid in self._frozen:
            self._frozen.discard(pid)
            _send(pid, signal.SIGCONT)


class Cast:
    """Everybody. `children` ends who is left at the end of the run."""

    def __init__(
        self, directory: Path, *, devices: Sequence[str], broker: RunningBroker, ways: Ways, children: Children
    ) -> None:
        def player(name: str, way: str, *arguments: str) -> Player:
            command = ways.command(way, [sys.executable, "-m", "reft_edge", *arguments])
            return Player(name, command, directory=directory, children=children)

        self.broker = broker
        self.coordinator = player(COORDINATOR, COORDINATOR, "coordinator", FEDERATION_FILE, "--progress", "plain")
        self.agents = {device: player(f"agent-{device}", device, "agent", f"agent-{device}.toml") for device in devices}
        self.ice = Ice()

    def start(self) -> None:
        for agent in self.agents.values():
            agent.start()
        self.coordinator.start()

    def worker(self, device: str) -> int | None:
        """Process id of an agent's worker; None when it has none."""
        return worker_of(self.agents[device])

    def died(self) -> list[str]:
        """About those that ended without having been killed."""
        agents = [agent for agent in self.agents.values() if not agent.killed and agent.status is not None]
        return [agent.obituary() for agent in agents]


def worker_of(agent: Player) -> int | None:
    """Process id of an agent's worker; None when it has none."""
    pid = agent.pid
    return None if pid is None else next((child for child in _children(pid) if _is_worker(child)), None)


def processes_in(directory: Path) -> list[str]:
    """Command lines of processes that work in `directory` or were started with a file of it."""
    root = os.fsencode(directory)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has just ended
            command = (entry / "cmdline").read_bytes()
            where = os.fsencode((entry / "cwd").readlink())
            if root in command or where == root or where.startswith(root + b"/"):
                found.append(f"{entry.name}: {command.replace(bytes(1), b' ').decode(errors='replace').strip()}")
    return found


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _children(pid: int) -> list[int]:
    """Also of its threads: a child belongs to the thread that started it."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return _WORKER_MODULE in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
