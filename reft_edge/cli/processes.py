"""What commands that go on for long have in common: SIGTERM, and the dashboard in a process beside them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from reft_edge import logs


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def dashboard_beside(settings: Path, port: int | None) -> Iterator[None]:
    """The dashboard in a process of its own, where a port is given: its work does not delay rounds."""
    if port is None:
        yield
        return
    command = [sys.executable, "-m", "reft_edge", "dashboard", str(settings), "--port", str(port)]
    command += ["--log-format", logs.chosen_format()]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            yield
        finally:
            process.terminate()
