"""A clock that stands still while others have the processor.

On a busy device no quarter of a second is undisturbed, so the best of many timings still tells how busy it was: on two
cores with eight other processes, less than half of what the device can do. The kernel keeps count of how long each
thread was ready to run and waited for a core (Documentation/scheduler/sched-stats.rst); without that time two
measurements agree, whatever runs beside them. What others do to caches and to a core's other hyperthread stays in.

Not for a process under a quota of its control group: there, waiting is what the device is like.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from reft_edge.profiling.cgroups import cpu_quota

_TASKS = Path("/proc/self/task")


def waited_ns() -> int:
    """How long this process's first thread has waited for a core; 0 where the kernel does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/schedstat").read_text().split()[1])
    return 0


class UndisturbedClock:
    """Seconds, as `time.perf_counter`, less those that the threads of this process waited for a core.

    `threads`: how many compute at the same time. Their waiting is shared out evenly: when all wait together that is
    the time lost, and when they wait in turn it is less, never more. Threads that begin later are not counted. Where
    the kernel does not tell, this is `time.perf_counter`. A context manager, because it holds a file open a thread.
    """

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._files: list[int] = []

    def __enter__(self) -> UndisturbedClock:
        with contextlib.suppress(OSError):
            for task in sorted(_TASKS.iterdir()):
                with contextlib.suppress(OSError):  # a thread that has just ended
                    self._files.append(os.open(task / "schedstat", os.O_RDONLY | os.O_CLOEXEC))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    def __call__(self) -> float:
        return time.perf_counter() - self._waited_s() / self._threads

    def _waited_s(self) -> float:
        """Of all threads since each began."""
        total = 0
        for file in self._files:
            with contextlib.suppress(OSError, ValueError, IndexError):
                total += int(os.pread(file, 64, 0).split()[1])
        return total * 1e-9


def own_clock(*, threads: int) -> AbstractContextManager[Callable[[], float]]:
    """The clock to time this process's computing with, on `threads` threads that have begun."""
    return contextlib.nullcontext(time.perf_counter) if cpu_quota() is not None else UndisturbedClock(threads=threads)
