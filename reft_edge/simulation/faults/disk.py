"""A spool with a disk of its own, small enough to be filled: a tmpfs, where we may mount one.

Elsewhere nothing is mounted and nothing can be filled: `why_not` says so, and the campaign draws other faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from reft_edge.errors import ResourceError

_SIZE_BYTES = 64 * 2**20
"""Agents leave 16 MiB of a disk to others; a task of the small model takes about 2."""

_FILLER = "other-data"
_PIECE_BYTES = 2**20
_MNT_DETACH = 2


def why_not() -> str | None:
    """Why no disk of its own can be had here; None where it can."""
    return None if os.geteuid() == 0 and hasattr(ctypes.CDLL(None), "mount") else "mounting a tmpfs needs root on Linux"


class Disk:
    """A tmpfs at `path`, and with `fill` nothing is left of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fill(self) -> Callable[[], None]:
        """Take all its room; the result gives it back."""
        filler = self._path / _FILLER
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:  # OSError: now it is full
            while True:
                file.write(bytes(_PIECE_BYTES))
        return lambda: filler.unlink(missing_ok=True)


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    """A disk of its own at `path`, which is created. Raises `ResourceError`."""
    path.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    target = os.fsencode(path)
    if libc.mount(b"tmpfs", target, b"tmpfs", 0, f"size={_SIZE_BYTES}".encode()) != 0:
        raise ResourceError(f"no tmpfs can be mounted at {path}: {os.strerror(ctypes.get_errno())}")
    try:
        yield Disk(path)
    finally:
        libc.umount2(target, _MNT_DETACH)
