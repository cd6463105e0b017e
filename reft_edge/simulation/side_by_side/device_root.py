"""The process above a device's processes: `python -m reft_edge.simulation.side_by_side.device_root COMMAND...`.

It starts the command, adopts what the command's descendants leave behind, and waits for all of them, so that the kernel
adds up their CPU time here (`processes`). It ends with the command, with its status, and takes the rest along.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

from reft_edge.simulation.children import end_with_parent
from reft_edge.simulation.side_by_side.processes import descendants

_PR_SET_CHILD_SUBREAPER = 36
"""prctl(2), Linux 3.4."""


def main(command: list[str]) -> int:
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise SystemExit("this system has no child subreapers; CPU time of orphans would be lost")
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if child is None:
            raise SystemExit(128 + number)
        os.kill(child.pid, number)

    signal.signal(signal.SIGTERM, pass_on)  # before there is a child that could tell somebody to stop us
    child = subprocess.Popen(command, preexec_fn=end_with_parent())
    status = _wait_for(child.pid)
    while rest := descendants(os.getpid()):
        for pid in rest:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.wait()
    return 128 - status if status < 0 else status


def _wait_for(pid: int) -> int:
    """Reap whoever ends, until `pid` does; its exit status, negative for a signal."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
