"""Keep the worker within its bounds: memory, priority, and never outliving the daemon. Linux only where it matters.

Called by the worker about itself, before it loads anything large.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
from pathlib import Path

from reft_edge.agent.settings import Limits

_PR_SET_PDEATHSIG = 1

_OOM_FIRST = "1000"
"""The highest score: when memory runs out the kernel ends the worker before the agent or the device's main job."""

logger = logging.getLogger(__name__)


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


def cap_memory(limits: Limits) -> None:
    """Cap what this process may allocate, so that a step that needs too much fails and can be reported.

    The cap is on data (RLIMIT_DATA: heap and private writable memory). That is what a model's tensors take; the code of
    libraries, which other processes share, is not in it.
    """
    if limits.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))


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
