"""What a worker occupies before it holds a model: `python -m reft_edge.agent.base_memory` prints the bytes.

Measured in a process of its own, because the one that asks has measured other things before and holds their memory.
"""

from __future__ import annotations

import subprocess
import sys

from reft_edge.profiling.memory import resident_bytes

_LONGEST_S = 60.0
"""An SD card reads the 60 MB of onnxruntime and numpy in 3 to 10 s."""


def runtime_base_bytes() -> int | None:
    """Resident memory of a fresh process with everything that training needs loaded; None if it does not start."""
    command = [sys.executable, "-m", "reft_edge.agent.base_memory"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = answer.stdout.strip()
    return int(text) if answer.returncode == 0 and text.isdigit() else None


def _load_what_a_worker_loads() -> None:
    import onnxruntime  # noqa: F401 - loading it is the point

    import reft_edge.agent.trainer  # noqa: F401


if __name__ == "__main__":
    _load_what_a_worker_loads()
    print(resident_bytes())
