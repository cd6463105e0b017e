"""What a worker takes before it holds a model, in memory and in time to start.

Measured in a process of its own, because the one that asks has measured other things before and holds their memory:
`python -m reft_edge.agent.empty_worker` loads what a worker loads and prints the bytes that it then occupies, and how
long it waited for a core meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import NamedTuple

from reft_edge.profiling.cgroups import cpu_quota
from reft_edge.profiling.memory import resident_bytes
from reft_edge.profiling.undisturbed import waited_ns

_LONGEST_S = 60.0
"""An SD card reads the 60 MB of onnxruntime and numpy in 3 to 10 s."""


class EmptyWorker(NamedTuple):
    """A fresh process with everything loaded that training needs."""

    resident_bytes: int
    start_s: float
    """Less the time in which others had the core; unless a quota makes it wait, as it will every worker."""


def measure_empty_worker() -> EmptyWorker | None:
    """Start one, and wait until it has ended again; None if it does not start."""
    command = [sys.executable, "-m", "reft_edge.agent.empty_worker"]
    started = time.monotonic()
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = answer.stdout.split()
    if answer.returncode != 0 or len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    waited_s = 0.0 if cpu_quota() is not None else int(words[1]) * 1e-9
    return EmptyWorker(resident_bytes=int(words[0]), start_s=time.monotonic() - started - waited_s)


def _load_what_a_worker_loads() -> None:
    import onnxruntime  # noqa: F401 - loading it is the point

    import reft_edge.agent.trainer  # noqa: F401


if __name__ == "__main__":
    _load_what_a_worker_loads()
    print(resident_bytes(), waited_ns())
