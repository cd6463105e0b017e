"""Keep the worker within its bounds: memory, priority, and never outliving the daemon. Linux only where it matters.

Called by the worker about itself, before it loads anything large.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from reft_edge.agent.settings import Limits
from reft_edge.profiling.memory import resident_bytes

_PR_SET_PDEATHSIG = 1

_OOM_FIRST = "1000"
"""The highest score: when memory runs out the kernel ends the worker before the agent or the device's main job."""

_LOOK_EVERY_S = 0.02
"""A board fills 10 to 40 MB of fresh memory in this time; one look takes 40 microseconds."""

_RESERVED_PER_RESIDENT = 2
"""onnxruntime's arena grows by powers of two."""

_RESERVED_BASE_BYTES = 128 * 2**20
"""What Python, its libraries and their threads' stacks reserve without using it (measured: 79 MiB)."""


def die_with_parent(parent: int) -> None:
    """Be killed when the daemon dies, however it dies. Exits if process `parent` is gone already."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the closed pipe tells us, a little later
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the agent has gone")


def step_back(limits: Limits) -> None:
    """Let other processes go first, and be the first to go when the device's memory runs out."""
    with contextlib.suppress(OSError):
        os.nice(limits.nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_FIRST)


class MemoryWatch:
    """Holds this process to `limit_bytes` of resident memory while `watching`; then calls `on_excess(resident_bytes)`.

    Resident memory is what the device really gives, and what plans are made with. An rlimit cannot bound it: it bounds
    what is reserved, and onnxruntime's arena reserves up to twice what it uses. One is set nevertheless, far enough
    above, against a single allocation that would overrun the device between two looks.
    """

    def __init__(self, limit_bytes: int, on_excess: Callable[[int], None]) -> None:
        self._limit_bytes = limit_bytes
        self._on_excess = on_excess
        self._active = threading.Event()
        reserve = _RESERVED_PER_RESIDENT * limit_bytes + _RESERVED_BASE_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (reserve, reserve))
        threading.Thread(target=self._watch, name="memory-watch", daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._active.set()
        try:
            yield
        finally:
            self._active.clear()

    def _watch(self) -> None:
        while True:
            self._active.wait()
            if (resident := resident_bytes()) > self._limit_bytes:
                self._on_excess(resident)
            time.sleep(_LOOK_EVERY_S)


def forget_peak_memory() -> None:
    """Begin a new measurement of `peak_memory_bytes`, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak resident memory since `forget_peak_memory`, or since the process started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
