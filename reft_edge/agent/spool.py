"""The agent's folder on disk: what survives a kill or a power cut.

    <spool>/
      lock             held while an agent runs
      state.json       the session's state
      deployment.json  the deployment session's state
      serving/         the models that this device serves and served (`serving.slots`, also written by the worker)
      profile.json     the measured device profile, so that a restart need not measure again
      data.json        what the data were when they were last read
      blobs/           models, weights and the update, by SHA-256 (also written by the worker)
      rebuilt/         weights that were put together from a base and a delta, by the SHA-256 of the blob they stand for
                       (written by the worker)
      residuals/       what the next update's encoding goes on from (written by the worker)

Small files are replaced atomically. A file that cannot be read as what it should be is treated as absent: the worst
that follows is that something is fetched, measured or trained again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TypeVar

import msgspec

from reft_edge.agent.serving.deployment_words import DeploymentState
from reft_edge.agent.session_words import SessionState
from reft_edge.bundle.manifest import MAX_MANIFEST_BYTES
from reft_edge.data.description import DataDescription
from reft_edge.errors import ConfigError, ResourceError, one_line
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire.blobs import BlobStore, sync_directory

REBUILT = "rebuilt"

_STATE_FILE = "state.json"
_DEPLOYMENT_FILE = "deployment.json"
_LOCK_FILE = "lock"

Kept = TypeVar("Kept", bound=msgspec.Struct)

logger = logging.getLogger(__name__)


class CachedProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A measured profile and what it was measured for."""

    key: str
    profile: DeviceProfile


class CachedData(msgspec.Struct, frozen=True, kw_only=True):
    """A description of the data and the fingerprint of the files it was made from."""

    key: str
    description: DataDescription


class Spool:
    """The folder `root`, which is created. Raises `ResourceError` when the disk refuses."""

    def __init__(self, root: Path, *, max_blob_bytes: int) -> None:
        self.root = root
        self.rebuilt = root / REBUILT
        self.residuals = root / "residuals"
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)  # updates and what is left of them tell about the data
            self.rebuilt.mkdir(exist_ok=True)
            self.residuals.mkdir(exist_ok=True)
        except OSError as exc:
            raise ResourceError(f"spool {root}: {exc.strerror or exc}; choose a folder that can be written") from exc
        # A manifest has a limit of its own, and has to be read before one knows how large the model is.
        self.blobs = BlobStore(root / "blobs", max_blob_bytes=max(max_blob_bytes, MAX_MANIFEST_BYTES))
        self.was_used = (root / _STATE_FILE).exists()
        """Whether an agent that reached its broker has worked with this spool before."""
        self._lock: int | None = None

    def lock(self) -> None:
        """Make sure that no other agent uses this spool; raises `ConfigError`. The kernel unlocks when we die."""
        descriptor = os.open(self.root / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(descriptor)
            raise ConfigError(f"spool {self.root} is in use by another agent; give each agent its own") from exc
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load_state(self) -> SessionState:
        return self._load(_STATE_FILE, SessionState) or SessionState()

    def save_state(self, state: SessionState) -> None:
        self._save(_STATE_FILE, state)

    def load_deployment(self) -> DeploymentState:
        return self._load(_DEPLOYMENT_FILE, DeploymentState) or DeploymentState()

    def save_deployment(self, state: DeploymentState) -> None:
        self._save(_DEPLOYMENT_FILE, state)

    def load_profile(self, key: str) -> DeviceProfile | None:
        cached = self._load("profile.json", CachedProfile)
        return cached.profile if cached is not None and cached.key == key else None

    def save_profile(self, key: str, profile: DeviceProfile) -> None:
        self._save("profile.json", CachedProfile(key=key, profile=profile))

    def load_description(self, key: str) -> DataDescription | None:
        cached = self._load("data.json", CachedData)
        return cached.description if cached is not None and cached.key == key else None

    def save_description(self, key: str, description: DataDescription) -> None:
        self._save("data.json", CachedData(key=key, description=description))

    def has_weights(self, sha256: str) -> bool:
        """Whether the weights of this blob are here, fetched or rebuilt."""
        return self.blobs.has(sha256) or (self.rebuilt / sha256).is_file()

    def sweep(self, *, keep_blobs: AbstractSet[str], keep_residuals: AbstractSet[str]) -> None:
        """Remove blobs, also rebuilt ones, and residuals that nothing names any more."""
        freed = self.blobs.sweep(set(keep_blobs))
        _clear(self.rebuilt, keep=keep_blobs)
        _clear(self.residuals, keep=keep_residuals)
        if freed:
            logger.debug("swept %d bytes from the spool", freed)

    def _load(self, name: str, kind: type[Kept]) -> Kept | None:
        path = self.root / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            logger.warning("%s is of no use and is ignored: %s", path, one_line(str(exc)))
            return None

    def _save(self, name: str, value: msgspec.Struct) -> None:
        write_atomically(self.root / name, msgspec.json.encode(value))


def _clear(folder: Path, *, keep: AbstractSet[str]) -> None:
    try:
        for path in folder.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)
    except OSError as exc:
        raise ResourceError(f"{folder}: {exc.strerror or exc}; check the disk and its rights") from exc


def is_in_use(root: Path) -> bool:
    """Whether an agent works with the spool `root` now."""
    try:
        descriptor = os.open(root / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False  # nobody has ever, or it is not ours to ask
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait. The kernel unlocks when we die. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` so that a power cut leaves the old content or the new. Raises `ResourceError`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as exc:
        raise ResourceError(f"{path}: {exc.strerror or exc}; check the disk's room and rights") from exc
