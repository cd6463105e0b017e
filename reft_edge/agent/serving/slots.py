"""Two slots for the model that a device serves: the next one is written beside it, and then the name changes.

    <spool>/serving/
      a/  b/         each with model.onnx, and slot.json that says what it is
      current.json   which of the two serves, and whether the other is what a roll-back returns to

What a power cut leaves: a slot is written while the other one serves, and each of its files is on the disk before
slot.json says so; slot.json is, before current.json names the slot; and current.json is replaced as a whole. So
`current` is the model before or the model after, and a whole one, whenever it is looked at.

The agent's worker installs, its daemon switches and undoes; it may undo what serves while the worker installs, and no
order of their steps leaves anything but a whole model or none. Any process may read. A reader that has been told a path
may find it gone when two switches have passed meanwhile; `stamp` has changed then, and it asks again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import msgspec

from reft_edge.agent.spool import locked, write_atomically
from reft_edge.errors import BundleError, LocalProtocolError, ResourceError
from reft_edge.wire.blobs import sync_directory
from reft_edge.wire.deployment import Precision
from reft_edge.wire.messages import Name

SERVING = "serving"
"""Of an agent's spool, the folder that all this is in."""
CHECK = "check"
"""Below it, where the worker unpacks what it checks."""
COUNTS = "counts"
"""Below it, where processes that predict count (`serving.counts`)."""

MODEL = "model.onnx"

_DESCRIPTION = "slot.json"
_CHOICE = "current.json"
_LOCK = "lock"
"""Held by who replaces current.json."""

_SlotName: TypeAlias = Literal["a", "b"]
_NAMES: tuple[_SlotName, _SlotName] = ("a", "b")

Kept = TypeVar("Kept", bound=msgspec.Struct)

logger = logging.getLogger(__name__)


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in a slot."""

    version: Name
    deployment: Name
    """The roll-out that brought it."""
    model: str
    precision: Precision
    sha256: str
    """Of model.onnx."""
    size_bytes: int
    classes: tuple[str, ...] = ()
    """Names in the order of the model's outputs; empty: indices."""


@dataclass(frozen=True, kw_only=True)
class InstalledModel:
    """A model that lies whole in a slot, as far as its size tells."""

    slot: Slot
    path: Path
    """Of the ONNX file."""

    def verified(self) -> bool:
        """Whether the file is what was installed, byte for byte. Reads all of it, a piece at a time."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.slot.sha256
        except OSError:
            return False


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    """current.json."""

    slot: _SlotName | None = None
    """The one that serves; None: nothing is served (any more)."""
    previous: bool = False
    """Whether the other slot holds what a roll-back returns to. If not, what is there waits to be switched to."""


class Slots:
    """The two slots below `root`, which is made when something is installed. Reading never raises, nor writes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def current(self) -> InstalledModel | None:
        """What is served: the model that was switched to last, or what was served before where that one is damaged."""
        choice = self._choice()  # once: it may change at any moment
        return self._read(choice.slot) or (self._read(_other(choice.slot)) if choice.previous else None)

    def previous(self) -> InstalledModel | None:
        """What a roll-back returns to; None: to serving nothing."""
        choice = self._choice()
        return self._read(_other(choice.slot)) if choice.previous else None

    def installed(self) -> InstalledModel | None:
        """What waits to be switched to."""
        choice = self._choice()
        if choice.previous:
            return None
        names = _NAMES if choice.slot is None else (_other(choice.slot),)
        return next((model for name in names if (model := self._read(name)) is not None), None)

    def stamp(self) -> object:
        """Changes whenever `current` may have, and costs one `stat`. To be compared, and nothing else."""
        try:
            found = (self.root / _CHOICE).stat()
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns)

    def obstacle(self) -> str | None:
        """What here this process may not read, and why, for who finds nothing; None: it may read all that there is."""
        places = [folder / name for folder in (self.root / each for each in _NAMES) for name in (_DESCRIPTION, MODEL)]
        for path in (self.root / _CHOICE, *places):
            try:
                path.open("rb").close()
            except FileNotFoundError:
                continue
            except OSError as exc:
                return f"{path} cannot be read: {exc.strerror or exc}"
        return None

    def install(self, slot: Slot, source: bytes | Path) -> None:
        """Put a model into the slot that does not serve, in place of what lay there. It is not served yet.

        Until it is, a roll-back would return to nothing. A file is moved, and so must lie on the same file system; it
        is removed when it is not what `slot` says. Raises `BundleError` then, and `ResourceError` from the disk.
        """
        if self._read(self._choice().slot) is None and self.previous() is not None:
            self.roll_back()  # the current slot is damaged, and so the other one serves
        folder = self.root / _other(self._choice().slot)
        with _storage_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(self.root.parent)
        if self._choice().previous or not self._has_choice():
            self._choose(_Choice(slot=self._choice().slot))
        with _storage_errors(folder):
            # First of all: a description must never stand beside another's model.
            self._clear(folder)
            sync_directory(folder)
            if self._choice().slot is None:
                self._clear(self.root / "b")  # where nothing serves, what is here is what was installed last
            arrived = source if isinstance(source, Path) else _write(folder / "arrived.tmp", source)
            whole = arrived.stat().st_size == slot.size_bytes and InstalledModel(slot=slot, path=arrived).verified()
            if not whole:
                arrived.unlink(missing_ok=True)
                raise BundleError(f"{slot.model} of {slot.version} is not what its SHA-256 says; it was not installed")
            _sync_file(arrived)
            arrived.replace(folder / MODEL)
            sync_directory(folder)
        write_atomically(folder / _DESCRIPTION, msgspec.json.encode(slot))

    def switch(self) -> None:
        """Serve what was installed last. Raises `LocalProtocolError` when there is nothing, and `ResourceError`."""
        arrived = self.installed()
        if arrived is None:
            raise LocalProtocolError(f"{self.root}: nothing is installed that could be switched to")
        name = next(name for name in _NAMES if self.root / name == arrived.path.parent)
        self._choose(_Choice(slot=name, previous=self._read(self._choice().slot) is not None))
        logger.info("serving %s (%s, %s)", arrived.slot.version, arrived.slot.model, arrived.slot.precision)

    def roll_back(self) -> None:
        """Serve what was served before the last switch, or nothing. What was served until now is removed.

        Raises `ResourceError`.
        """
        undone, before = self._choice().slot, self.previous()
        if undone is None:
            return
        self._choose(_Choice(slot=None if before is None else _other(undone)))
        with _storage_errors(self.root / undone):
            self._clear(self.root / undone)
        logger.info("serving %s again", "nothing" if before is None else before.slot.version)

    def forget_previous(self) -> None:
        """Let a roll-back return to nothing: a person has undone what it would return to. Raises `ResourceError`."""
        choice = self._choice()
        if choice.slot is None or not choice.previous:
            return
        self._choose(_Choice(slot=choice.slot))
        with _storage_errors(self.root / _other(choice.slot)):
            self._clear(self.root / _other(choice.slot))

    def repair(self) -> str | None:
        """Give up a current slot whose content is damaged for what was served before it; what was wrong, or None.

        Reads the whole model. Raises `ResourceError`.
        """
        choice = self._choice()
        if choice.slot is None:
            return None
        current = self._read(choice.slot)
        if current is not None and current.verified():
            return None
        before = self.previous()
        if before is not None and not before.verified():
            before = None
            self._choose(_Choice(slot=choice.slot))
        self.roll_back()
        return (
            f"slot {self.root / choice.slot} is damaged on disk and was removed; "
            f"serving {'nothing' if before is None else before.slot.version}"
        )

    def _clear(self, folder: Path) -> None:
        (folder / _DESCRIPTION).unlink(missing_ok=True)
        (folder / MODEL).unlink(missing_ok=True)

    def _choice(self) -> _Choice:
        """current.json. Where that cannot be read, the slot that was described last: both have passed their check."""
        choice = _load(self.root / _CHOICE, _Choice)
        if choice is not None:
            return choice
        if self.stamp() is None:
            return _Choice()  # nothing was ever installed, or it is out of our reach
        whole = [name for name in _NAMES if self._read(name) is not None]
        latest = sorted(whole, key=lambda name: _changed_at(self.root / name / _DESCRIPTION))[-1:]
        return _Choice(slot=latest[0] if latest else None)

    def _has_choice(self) -> bool:
        """Whether current.json can be read."""
        return _load(self.root / _CHOICE, _Choice) is not None

    def _choose(self, choice: _Choice) -> None:
        with _storage_errors(self.root / _LOCK), locked(self.root / _LOCK):
            write_atomically(self.root / _CHOICE, msgspec.json.encode(choice))

    def _read(self, name: _SlotName | None) -> InstalledModel | None:
        """What lies in a slot, if its file is there and has its size."""
        if name is None:
            return None
        folder = self.root / name
        slot = _load(folder / _DESCRIPTION, Slot)
        if slot is None:
            return None
        try:
            size = (folder / MODEL).stat().st_size
        except OSError:
            return None
        return InstalledModel(slot=slot, path=folder / MODEL) if size == slot.size_bytes else None


def _other(name: _SlotName | None) -> _SlotName:
    """The slot that does not serve."""
    return "b" if name == "a" else "a"


def _load(path: Path, kind: type[Kept]) -> Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _changed_at(path: Path) -> int:
    """Nanoseconds; 0 for a file that has just gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ResourceError(f"{path}: {exc.strerror or exc}; check the disk's room and rights") from exc
