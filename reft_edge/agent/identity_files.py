"""The files of an enrolment in the agent's folder, replaced together.

    <directory>/
      identity.key       the private key (mode 0600)
      identity.pem       its certificate; replaced when it is renewed
      ca.pem             the authority that signed it and the broker's
      coordinator.pem    the public key of the coordinator, who alone is obeyed
      agent.toml         settings; one that exists is kept

The five belong together, and a file system replaces one at a time. So they are written to a folder beside first, which
becomes valid by its rename; `finish_install` moves them into place, now or when the agent starts after a kill in
between.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from reft_edge.errors import ResourceError
from reft_edge.wire.blobs import sync_directory

KEY_FILE = "identity.key"
CERTIFICATE_FILE = "identity.pem"
CA_FILE = "ca.pem"
COORDINATOR_FILE = "coordinator.pem"
SETTINGS_FILE = "agent.toml"

_READY = ".enrolment"
_UNFINISHED = ".enrolment.tmp"
_FILES = (KEY_FILE, CERTIFICATE_FILE, CA_FILE, COORDINATOR_FILE, SETTINGS_FILE)


def replace_together(contents: Mapping[str, bytes], directory: Path) -> None:
    """Replace files of `directory` (which is created): all of them, as soon as this returns or the agent starts.

    A kill at any moment leaves the old ones, or the new ones for `finish_install`. Raises `ResourceError`.
    """
    with _disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    finish_install(directory)
    with _disk_errors(directory):
        try:
            _make_ready(contents, directory)
        except OSError:
            shutil.rmtree(directory / _UNFINISHED, ignore_errors=True)  # it holds a private key
            raise
    finish_install(directory)


def finish_install(directory: Path) -> None:
    """Complete or undo an installation that was interrupted. Raises `ResourceError`."""
    ready, unfinished = directory / _READY, directory / _UNFINISHED
    with _disk_errors(directory):
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        if not ready.is_dir():
            return
        for name in _FILES:
            if (ready / name).exists():
                (ready / name).replace(directory / name)
        sync_directory(directory)
        ready.rmdir()


def _make_ready(contents: Mapping[str, bytes], directory: Path) -> None:
    """Write all files durably into a folder whose rename makes them valid. They belong to the owner of `directory`.

    So root may enrol a service that runs as somebody else, who must read the key and replace the certificate.
    """
    owner = directory.stat()
    folder = directory / _UNFINISHED
    folder.mkdir(mode=0o700)
    for name, data in contents.items():
        mode = 0o600 if name == KEY_FILE else 0o644
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if os.geteuid() == 0:
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.flush()
            os.fsync(descriptor)
    if os.geteuid() == 0:
        os.chown(folder, owner.st_uid, owner.st_gid)
    sync_directory(folder)
    folder.rename(directory / _READY)
    sync_directory(directory)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        where = exc.filename or directory
        raise ResourceError(f"{where}: {exc.strerror or exc}; choose a --directory that can be written") from exc
