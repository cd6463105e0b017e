"""A federation on this machine: one coordinator and one agent a board, each an operating-system process of its own.

They are started as a person would start them, and meet only at the broker. What happened is read from the coordinator's
standard output.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

import reft_edge
from reft_edge.coordinator.events import Event, Finished
from reft_edge.coordinator.records import DeployedDevice
from reft_edge.coordinator.report.stream import read_event
from reft_edge.errors import FederationError, RemoteProtocolError
from reft_edge.simulation.children import Child, Children
from reft_edge.simulation.run_directory import FEDERATION_FILE, log_path

COORDINATOR = "coordinator"
DEPLOY = "deploy"
_LOOK_S = 0.25
"""How often the children are looked at while nothing is said."""


def run_fleet(directory: Path, agents: Sequence[Path], *, children: Children, timeout_s: float) -> Iterator[Event]:
    """Start coordinator and agents on the prepared `directory`; yields events until the federation has finished.

    `agents`: their settings files, each in the folder of its device somewhere below `directory`.

    The processes belong to `children`, which ends them. Raises `FederationError` when one of them fails, or when it all
    takes longer than `timeout_s`.
    """
    coordinator = _start(
        children, directory, COORDINATOR, ["coordinator", FEDERATION_FILE, "--events"], read_output=True
    )
    for settings in agents:
        name = f"agent-{settings.parent.name}"
        _start(children, directory, name, ["agent", str(settings.relative_to(directory))])
    yield from follow(coordinator, children=children, timeout_s=timeout_s)


def follow(coordinator: Child, *, children: Children, timeout_s: float) -> Iterator[Event]:
    """What a coordinator tells that was started with `--events`, until it has finished and ended.

    Raises `FederationError` as `run_fleet`.
    """
    end = time.monotonic() + timeout_s
    lines = _Lines(coordinator)
    for line in _until_end(lines, coordinator, children, end):
        event = _read(line, coordinator)
        if event is not None:
            yield event
            if isinstance(event, Finished):
                break
    try:
        status = coordinator.process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired as exc:
        raise FederationError(f"the coordinator has finished but does not end (log: {coordinator.log_path})") from exc
    if status != 0:
        raise FederationError(coordinator.obituary())


def deploy_run(directory: Path, *, children: Children, timeout_s: float) -> list[DeployedDevice]:
    """Deploy the run that `run_fleet` has finished to its agents; returns what every device made of it.

    Raises `FederationError` as `run_fleet`, and where a device that is there does not serve it.
    """
    deploying = _start(children, directory, DEPLOY, ["deploy", FEDERATION_FILE, "--json"], read_output=True)
    said = b"".join(_until_end(_Lines(deploying), deploying, children, time.monotonic() + timeout_s, may_end=True))
    if deploying.process.wait() != 0:
        raise FederationError(deploying.obituary())
    return msgspec.json.decode(said, type=_Deployed).devices


class _Deployed(msgspec.Struct, frozen=True, kw_only=True):
    """Of what `reft-edge deploy --json` prints, the part that is read here."""

    devices: list[DeployedDevice]


def _until_end(
    lines: _Lines, coordinator: Child, children: Children, end: float, *, may_end: bool = False
) -> Iterator[bytes]:
    """The coordinator's lines, while everybody is well. `may_end`: its last line is no failure."""
    while True:
        line = lines.get(_LOOK_S)
        if line is not None:
            if not line and may_end:
                return
            if not line:
                coordinator.process.wait()
                raise FederationError(coordinator.obituary())
            yield line
            continue
        if (failed := children.failed()) is not None:
            raise FederationError(failed.obituary())
        if time.monotonic() > end:
            raise FederationError(f"{coordinator.name} takes too long; it was stopped (log: {coordinator.log_path})")


class _Lines:
    """A child's output by lines, read in a thread so that silence does not keep us from looking at the others."""

    def __init__(self, child: Child) -> None:
        if child.output is None:
            raise ValueError(f"the output of {child.name} is not read")
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(child.output,), name=f"{child.name}-output", daemon=True).start()

    def get(self, timeout_s: float) -> bytes | None:
        """The next line; empty at the end; None when there was none in time."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _read(self, output: IO[bytes]) -> None:
        try:
            for line in output:
                self._lines.put(line)
        except (OSError, ValueError):  # closed under us, when the child was ended
            pass
        self._lines.put(b"")


def _start(
    children: Children, directory: Path, name: str, arguments: Sequence[str], *, read_output: bool = False
) -> Child:
    packages = [str(Path(reft_edge.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return children.start(
        name,
        [sys.executable, "-m", "reft_edge", *arguments],
        log_path=log_path(directory, name),
        directory=directory,
        environment={
            "PYTHONPATH": os.pathsep.join(filter(None, packages)),
            # All share a few cores; threads of one that wait for each other would take them from the others.
            "OMP_NUM_THREADS": "1",
        },
        read_output=read_output,
    )


def _read(line: bytes, coordinator: Child) -> Event | None:
    try:
        return read_event(line)
    except RemoteProtocolError as exc:
        raise FederationError(f"{exc} (log: {coordinator.log_path})") from exc
