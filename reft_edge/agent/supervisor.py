"""The worker process as the daemon sees it: start it when there is work, hear what it says, notice how it ended.

One thread a worker reads its answers and waits for its end; both become events in the daemon's queue. Nothing here
restarts anything: what a death means is the daemon's business.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.agent.child import start_child
from reft_edge.agent.protocol import Answer, Command, Configure, decode_answer, encode_line
from reft_edge.agent.session_words import FailureKind
from reft_edge.errors import LocalProtocolError

STOP_S = 3.0
"""A worker that is told to go ends at once; one that does not, for example in a long system call, is killed."""

NEAR_LIMIT = 0.8
"""A worker that died by a signal having used this share of its memory limit died of it: libraries abort when an
allocation fails where they cannot report it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSaid:
    worker: int
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class WorkerEnded:
    """`kind` and `reason` say how, for a worker that was not told to go."""

    worker: int
    kind: FailureKind
    reason: str


class Supervisor:
    """Starts and stops one worker at a time. `events` receives `WorkerSaid` and `WorkerEnded`.

    `worker` in events is the process id: events of an earlier worker may still be in the queue when the next has begun.
    """

    def __init__(self, configure: Configure, events: queue.SimpleQueue[Any]) -> None:
        self._configure = configure
        self._events = events
        self._pid: int | None = None
        self._commands = -1
        self._reader: threading.Thread | None = None

    @property
    def worker(self) -> int | None:
        """Process id of the present worker."""
        return self._pid

    def send(self, command: Command) -> None:
        """Give the worker a command, starting it if there is none. Raises `ResourceError` if it cannot be started."""
        if self._pid is None:
            self._start()
        self._write(command)

    def forget(self, worker: int) -> None:
        """The worker has ended by itself (after its `WorkerEnded`)."""
        if worker == self._pid:
            self._release()

    def stop(self) -> None:
        """Tell the worker to go and wait for its end; kill it if it stays. Its `WorkerEnded` is of no interest."""
        pid, reader = self._pid, self._reader
        if pid is None:
            return
        self._release()
        if reader is not None:
            reader.join(STOP_S)
            if reader.is_alive():
                logger.warning("the worker does not stop; killing it")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                reader.join()

    def _start(self) -> None:
        pid, self._commands, answers = start_child("reft_edge.agent.worker", str(os.getpid()))
        logger.debug("worker %d started", pid)
        self._pid = pid
        self._reader = threading.Thread(target=self._read, args=(pid, answers), name="worker", daemon=True)
        self._reader.start()
        self._write(self._configure)

    def _write(self, command: Command) -> None:
        data = encode_line(command)
        with contextlib.suppress(BrokenPipeError):  # it has just died: its WorkerEnded is on the way
            while data:
                data = data[os.write(self._commands, data) :]

    def _release(self) -> None:
        os.close(self._commands)
        self._pid, self._commands, self._reader = None, -1, None

    def _read(self, pid: int, descriptor: int) -> None:
        """Thread: pass on answers until the worker closes its end, then see how it ended."""
        kills_before = _oom_kills()
        with open(descriptor, "rb") as answers:
            for line in answers:
                try:
                    self._events.put(WorkerSaid(worker=pid, answer=decode_answer(line)))
                except LocalProtocolError as exc:
                    logger.error("%s", exc)
        _, status, usage = os.wait4(pid, 0)
        kind, reason = explain_end(
            os.waitstatus_to_exitcode(status),
            peak_bytes=usage.ru_maxrss * 1024,
            limit_bytes=self._configure.limits.memory_bytes,
            oom_killed=_oom_kills() > kills_before,
        )
        self._events.put(WorkerEnded(worker=pid, kind=kind, reason=reason))


def explain_end(code: int, *, peak_bytes: int, limit_bytes: int | None, oom_killed: bool) -> tuple[FailureKind, str]:
    """What an end that nobody asked for means. `code` is the exit status, negative for a signal."""
    if code >= 0:
        return "crashed", f"the worker ended with exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    near_limit = limit_bytes is not None and peak_bytes >= NEAR_LIMIT * limit_bytes
    if near_limit or (code == -signal.SIGKILL and oom_killed):
        return "out_of_memory", f"the worker died of {name} having used {peak_bytes / 2**20:.0f} MiB"
    return "crashed", f"the worker died of {name}"


def _oom_kills() -> int:
    """How often the kernel ended a process for lack of memory; 0 where it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
