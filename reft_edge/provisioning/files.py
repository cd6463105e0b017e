"""Writing secrets and lists so that nothing is ever half written or readable by others."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_edge.errors import ConfigError, ResourceError
from reft_edge.wire.blobs import sync_directory

PRIVATE = 0o600
PUBLIC = 0o644
"""For what is no secret; the folders around it are 0700 all the same."""
FOLDER = 0o700

NEW = ".new"
"""Ends the name of a file that is being written; it begins with a dot, so that `broker/*` leaves it out."""

MAX_FILE_BYTES = 64 * 2**20
"""64 MiB: a ledger of 50,000 certificates. A larger file is some other file."""

_LOCK_WAIT_S = 10.0
_LOCK_POLL_S = 0.1


def pending_path(path: Path) -> Path:
    """Where the content of `path` is written before it gets its name."""
    return path.with_name(f".{path.name}{NEW}")


def write_pending(path: Path, data: bytes, mode: int) -> Path:
    """Write `data` beside `path` and make it durable; `settle` gives it the name. Raises `ResourceError`."""
    pending = pending_path(path)
    try:
        pending.unlink(missing_ok=True)
        # The mode is the file's from its first moment, whatever the umask is.
        descriptor = os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
    except OSError as exc:
        raise _refused(path, exc) from exc
    return pending


def settle(path: Path) -> None:
    """Give what `write_pending` wrote its name, replacing what had it. Raises `ResourceError`."""
    try:
        pending_path(path).replace(path)
        sync_directory(path.parent)
    except OSError as exc:
        raise _refused(path, exc) from exc


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Replace `path`: a power cut leaves the old content or the new. Raises `ResourceError`."""
    write_pending(path, data, mode)
    settle(path)


def read_file(path: Path) -> bytes:
    """Raises `ConfigError`."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; this is some other file")
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} is missing; restore it from a copy of the provisioning directory") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def remove_file(path: Path) -> None:
    """Raises `ResourceError`."""
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise _refused(path, exc) from exc


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on `folder`, waiting a little for another command. The kernel lets go when we die.

    Raises `ConfigError` when another one keeps it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise ConfigError(f"{folder} cannot be opened: {exc.strerror or exc}; run as its owner") from exc
    try:
        give_up_at = time.monotonic() + _LOCK_WAIT_S
        while not _take(descriptor):
            if time.monotonic() >= give_up_at:
                raise ConfigError(f"another `reft-edge provision` works on {folder}; try again when it has ended")
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refused(path: Path, exc: OSError) -> ResourceError:
    return ResourceError(f"{path}: {exc.strerror or exc}; check the disk's room and rights")
