"""Where a guide is followed: a folder stands for each machine, and a shell there runs what the guide says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.docs.guide import Command, File, Section

WAIT_S = 180.0
"""For a command to say what it should: ten times what the slowest takes on two idle cores."""

END_S = 15.0

_SCP = """#!/bin/sh
# `scp FILE... MACHINE:FOLDER` between folders of this computer, as a guide types it between machines.
for last; do :; done
mkdir -p "$MACHINES/${last%%:*}"
while [ $# -gt 1 ]; do cp -r "$1" "$MACHINES/${last%%:*}/${last#*:}" || exit 1; shift; done
"""


class GuideFailureError(AssertionError):
    """A step of a guide did not do what the guide says."""


class Site:
    """All machines of a guide. `substitutions`: what is typed here in place of what the guide says."""

    def __init__(self, root: Path, *, substitutions: Mapping[str, str]) -> None:
        self._root = root
        self._substitutions = substitutions
        self._running: dict[str, list[_Process]] = {}  # by machine
        programs = root / ".programs"
        programs.mkdir()
        (programs / "scp").write_text(_SCP)
        (programs / "scp").chmod(0o755)
        path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        # COLUMNS: tables as wide as on a usual terminal. Threads: the networks are tiny, a second one slows them down.
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "PATH": os.pathsep.join(path), "MACHINES": str(root), "COLUMNS": "110", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def folder(self, machine: str) -> Path:
        folder = self._root / (machine or "here")
        folder.mkdir(exist_ok=True)
        return folder

    def follow(self, sections: Iterable[Section]) -> None:
        for section in sections:
            for step in section.steps:
                if isinstance(step, File):
                    self._write(step)
                else:
                    self._type(step)

    def end(self) -> None:
        """End what was left running, the last first."""
        for process in reversed([each for running in self._running.values() for each in running]):
            process.end()

    def _write(self, file: File) -> None:
        for machine in file.machines:
            path = self.folder(machine) / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = self._substituted(file.text)
            path.write_text(changed(path.read_text(), text) if file.change else text)

    def _type(self, command: Command) -> None:
        if command.text == "^C":
            for process in self._running.pop(command.machine, ()):
                process.end()
            return
        text = self._substituted(command.text)
        process = _Process(text, folder=self.folder(command.machine), environment=self._environment)
        expected = pattern([self._substituted(line) for line in command.expected])
        where = f"line {command.line}, on {command.machine or 'the machine'}: {text}"
        if command.background or command.interrupted:
            if command.background:
                self._running.setdefault(command.machine, []).append(process)
            if not process.wait_for(expected):
                raise GuideFailureError(_differs(where, command, process.said()))
            if command.interrupted:
                process.end()
            return
        status = process.wait()
        said = process.said()
        should_fail = any(": error: " in line for line in command.expected)
        if (status != 0) != should_fail:
            raise GuideFailureError(f"{where}\n  ended with status {status} and said\n{said}")
        if not expected.search(said):
            raise GuideFailureError(_differs(where, command, said))

    def _substituted(self, text: str) -> str:
        for written, typed in self._substitutions.items():
            text = text.replace(written, typed)
        return text


class _Process:
    """A shell command, whose output is read as it comes."""

    def __init__(self, text: str, *, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", text],
            cwd=folder,
            env={**environment, "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches all of it, as on a terminal
        )
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with self._news:
                self._lines.append(line.decode(errors="replace"))
                self._news.notify_all()
        with self._news:
            self._has_ended = True
            self._news.notify_all()

    def said(self) -> str:
        with self._news:
            return "".join(self._lines)

    def wait_for(self, expected: re.Pattern[str]) -> bool:
        ends = time.monotonic() + WAIT_S
        with self._news:
            while not expected.search("".join(self._lines)):
                if self._has_ended or not self._news.wait(ends - time.monotonic()):
                    return False
        return True

    def wait(self) -> int:
        """The exit status. What takes too long is ended, which makes a status of its own."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(WAIT_S)
        self.end()
        return self._process.returncode

    def end(self) -> None:
        """Ctrl-C; what does not end then is killed."""
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_S)
        self._reader.join(END_S)
        if self._process.stdout:
            self._process.stdout.close()


def pattern(expected: Sequence[str]) -> re.Pattern[str]:
    """What matches the lines one after the other; `...` is anything in a line, and alone any lines, or none.

    How many spaces there are is not compared: columns are as wide as what is in them.
    """
    parts = []
    for line in expected:
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            words = [r"\s+".join(map(re.escape, re.split(" +", piece))) for piece in line.strip().split("...")]
            parts.append("[ \t]*" + "[^\n]*?".join(words) + r"[ \t]*\n")
    return re.compile("(?m)^" + "".join(parts) if parts else "")


def changed(text: str, change: str) -> str:
    """TOML with the keys and tables of `change` in place of its own of those names, or added to them."""
    first_table = re.search(r"(?m)^\[", change)
    top, tables = (
        (change, "") if first_table is None else (change[: first_table.start()], change[first_table.start() :])
    )
    for name in tomllib.loads(tables):
        found = re.search(rf"(?m)^\[{re.escape(name)}\][^\n]*\n(?:(?!\[).*\n?)*", text)
        if found is not None:
            text = text[: found.start()] + text[found.end() :]
    for name in tomllib.loads(top):
        text = re.sub(rf"(?m)\A((?:(?!\[).*\n)*?){re.escape(name)} = .*\n", r"\1", text)
    return f"{top}{text.rstrip()}\n\n{tables}"


def _differs(where: str, command: Command, said: str) -> str:
    return "\n".join([where, "  did not say", *(f"    {line}" for line in command.expected), "  but", said])


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on, all of them others."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [server.getsockname()[1] for server in servers]


@contextlib.contextmanager
def site(root: Path, *, substitutions: Mapping[str, str]) -> Iterator[Site]:
    made = Site(root, substitutions=substitutions)
    try:
        yield made
    finally:
        made.end()
