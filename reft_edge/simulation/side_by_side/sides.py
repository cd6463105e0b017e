"""What the trial asks of a side: start server and devices, then make a run and tell when its rounds end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import reft_edge
from reft_edge.config import convert_settings
from reft_edge.errors import FederationError
from reft_edge.provisioning.directory import Paths
from reft_edge.provisioning.issuing import begin
from reft_edge.provisioning.settings import ProvisioningSettings
from reft_edge.simulation.children import Child, Children
from reft_edge.simulation.side_by_side.star import HUB_ADDRESS

START_TIMEOUT_S = 300.0
"""For a process to be ready; seconds on a quiet machine, minutes on a busy one."""

ROUND_TIMEOUT_S = 300.0
"""For the next round to end; beyond it a side hangs."""

_LOOK_S = 0.05


class SideInPlay(Protocol):
    """One side, prepared in a folder of its own. What it starts belongs to the `Children` that it was made with."""

    @property
    def security(self) -> str:
        """What is on, for people."""

    @property
    def versions(self) -> Mapping[str, str]: ...

    @property
    def details(self) -> Mapping[str, str]:
        """What else one would want to know, once the run is over."""

    def start_devices(self) -> Sequence[int]:
        """Start the server, then the devices; returns their roots' process ids when all have announced themselves."""

    def run(self) -> Iterator[int]:
        """Ask for a run; yields 0 when its first round begins, then each round's number when it is over."""

    def accuracies(self) -> Sequence[float]:
        """Of the global model after each round, on the held-out part; once the run is over."""


def found_authority(root: Path, federation: str, port: int) -> Paths:
    """A new authority in the new folder `root`, with a certificate for whoever serves in the hub."""
    table = {"federation": federation, "broker_hosts": [HUB_ADDRESS], "port": port}
    settings = convert_settings(table, ProvisioningSettings, origin="the hub's address")
    return begin(root, settings, now=datetime.now(UTC)).paths


def start_device(
    children: Children, name: str, command: Sequence[str], *, within: Callable[[Sequence[str]], list[str]], folder: Path
) -> Child:
    """Start `command` as the main process of a device, below a root of its own, with `folder` as working directory.

    `within`: what puts a command into the device's network.
    """
    root = [sys.executable, "-m", "reft_edge.simulation.side_by_side.device_root", *command]
    return children.start(
        name, within(root), log_path=folder / f"{name}.log", directory=folder, environment=environment()
    )


def environment() -> dict[str, str]:
    """Of all processes of both sides: this package, and one thread for each computation, as on the other side."""
    packages = [str(Path(reft_edge.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, packages)), "OMP_NUM_THREADS": "1"}


def wait_until(ready: Callable[[], bool], what: str, children: Children, *, timeout_s: float) -> None:
    """Look until `ready`. Raises `FederationError` when a child fails meanwhile, or after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not ready():
        if (failed := children.failed()) is not None:
            raise FederationError(failed.obituary())
        if time.monotonic() > end:
            raise FederationError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(_LOOK_S)


def wait_for_words(child: Child, words: str, children: Children) -> None:
    """Until `words` stand in the child's log. Raises `FederationError` as `wait_until`."""

    def said() -> bool:
        return words in child.log_path.read_text(encoding="utf-8", errors="replace")

    wait_until(said, f"{child.name} ({words!r} in {child.log_path})", children, timeout_s=START_TIMEOUT_S)
