"""Child processes that never outlive us: each in its own process group, ended together, by force if need be.

A terminal's Ctrl-C reaches only us, because each child has a session of its own; we then end them in order. If we are
killed without a chance to, the kernel tells them (Linux). What a child writes goes to its log file, and its last words
are quoted when it fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

_PR_SET_PDEATHSIG = 1
"""prctl(2), Linux: the signal that a process gets when its parent dies."""

STOP_TIMEOUT_S = 8.0
"""An agent says goodbye to the broker and lets its worker go; that takes well under a second on a quiet machine."""

_MAX_QUOTED_CHARACTERS = 400


def end_with_parent() -> Callable[[], object] | None:
    """For a child, before exec: SIGTERM when the parent dies. Linux only; elsewhere a killed parent leaves it."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Child:
    """A running child. `output` is its standard output where that was asked for, else None."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def output(self) -> IO[bytes] | None:
        return self.process.stdout

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal's number; None while it runs."""
        return self.process.poll()

    def last_words(self) -> str:
        """The last line of its log that says something, shortened."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_MAX_QUOTED_CHARACTERS]

    def obituary(self) -> str:
        """One line about how it ended."""
        status = self.process.poll()
        how = (
            "is running"
            if status is None
            else f"was killed by signal {-status}"
            if status < 0
            else f"ended with {status}"
        )
        words = self.last_words()
        return f"{self.name} {how}{f': {words}' if words else ''} (log: {self.log_path})"


class Children:
    """Several children; as a context manager, all of them and their descendants are gone at the end of the block."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        read_output: bool = False,
    ) -> Child:
        """Start `command` in `directory`; standard error, and output unless `read_output`, go to `log_path`.

        Call it from a thread that lives as long as the child should: Linux tells the child when that thread ends.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if read_output else log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        child = Child(name=name, process=process, log_path=log_path)
        self._children.append(child)
        return child

    def failed(self) -> Child | None:
        """A child that has ended with an error, if there is one."""
        return next((child for child in self._children if child.status not in (None, 0)), None)

    def stop(self) -> None:
        """End all, the latest first, and wait for them. Ctrl-C is ignored meanwhile. Idempotent."""
        children, self._children = self._children[::-1], []
        with _ignoring_interrupts():
            for child in children:
                _signal_group(child, signal.SIGTERM)
            end = time.monotonic() + STOP_TIMEOUT_S
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, end - time.monotonic()))
            for child in children:
                _signal_group(child, signal.SIGKILL)  # also descendants that outlived an orderly end
                child.process.wait()
                if child.process.stdout is not None:
                    child.process.stdout.close()


def _signal_group(child: Child, number: signal.Signals) -> None:
    """To the child and what it started; a group without members is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """A second Ctrl-C must not leave half of the children behind. Only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
