"""Where and with what a benchmark ran: a figure without it cannot be repeated.

Says what the machine is, never which one: no host name, no user, no paths.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from reft_edge.profiling.system import read_system

PACKAGES = ("msgspec", "numpy", "onnx", "onnxruntime", "paho-mqtt", "torch", "torch-pruning", "zstandard")
"""Whose versions can change a figure."""

_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """One machine with one state of the code, and when it was first used for a file of results."""

    processor: str
    cores: float
    """Physical ones that the process may use."""
    memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]
    """Versions by name."""
    accelerator: str = ""
    """The GPU, where torch was loaded and sees one."""
    commit: str = ""
    """Of the checkout; with a `+` when the code had changes that are not in it, empty when it is no checkout."""
    date: str
    """UTC, ISO 8601."""

    def same_place(self, other: Provenance) -> bool:
        """Whether nothing but the date differs."""
        return msgspec.structs.replace(self, date=other.date) == other


def provenance() -> Provenance:
    """This machine and this code, now."""
    system = read_system()
    return Provenance(
        processor=system.processor,
        cores=system.cores,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=_versions(),
        accelerator=_accelerator(),
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # a device has no torch
    return found


def _accelerator() -> str:
    """Importing torch only to ask would cost 200 MiB in a benchmark that measures memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_name())


def _commit() -> str:
    git = ["git", "-C", str(_PACKAGE_FOLDER)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        tracked = ["status", "--porcelain", "--untracked-files=no", "--", "."]
        changes = subprocess.run([*git, *tracked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
