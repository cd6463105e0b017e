"""A disk that loses power at a chosen moment, and keeps no more than it was made to keep.

Every change of a file below `root` is counted: opening for writing, renaming, removing, making a folder, syncing. At
the chosen one `PowerCutError` is raised in its place. `lose_power` then puts the folder into the worst state that a
file system may leave: files with what was in them when they were synced, folders with the names they had when *they*
were synced.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class PowerCutError(BaseException):
    """No cleanup must catch it: there is no process left that could."""


class FailingDisk:
    """One at a time. `root` is all that is looked at; what it holds at first is on the disk."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._monkeypatch = monkeypatch
        self.n_changes = 0
        self._fails_at: int | None = None
        self._counting = False
        self._contents: dict[int, bytes] = {}
        """Inode -> what a sync has put on the disk."""
        self._names: dict[Path, dict[str, bytes | None]] = {}
        """Folder -> name -> content, or None for a folder, as of the folder's last sync."""
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            for path in folder.iterdir():
                if path.is_file():
                    self._contents[path.stat().st_ino] = path.read_bytes()
            self._sync_folder(folder)

    @contextmanager
    def failing(self, at: int | None) -> Iterator[None]:
        """Within this, power goes at change number `at`; None: never."""
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            self._change()
            fsync(descriptor)
            self._synced(descriptor)

        self.n_changes, self._fails_at, self._counting = 0, at, True
        _install_hook()
        _ACTIVE.append(self)
        try:
            with self._monkeypatch.context() as patched:
                patched.setattr(os, "fsync", noted)
                yield
        except PowerCutError:
            pass
        finally:
            self._counting = False
            _ACTIVE.remove(self)

    def lose_power(self) -> None:
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._restore(self.root)

    def _change(self) -> None:
        if self._counting:
            if self.n_changes == self._fails_at:
                self._counting = False  # the process is gone: what its `finally` clauses do, nobody does
                raise PowerCutError
            self.n_changes += 1

    def saw(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit event, before it happens."""
        match event, arguments:
            case "open", (str() as path, _, int() as flags) if flags & (os.O_WRONLY | os.O_RDWR):
                self._touch(Path(path))
            case "os.rename", (source, target, *_):
                self._touch(Path(source), Path(target))
            case (("os.remove" | "os.mkdir"), (path, *_)):
                self._touch(Path(path))

    def _touch(self, first: Path, second: Path | None = None) -> None:
        if not self._counting or self.root not in first.parents:
            return
        self._change()
        gone = second or first
        if gone.is_file():
            self._contents.pop(gone.stat().st_ino, None)  # numbers of removed files are used again

    def _synced(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self._sync_folder(path)
        else:
            self._contents[os.fstat(descriptor).st_ino] = path.read_bytes()

    def _sync_folder(self, folder: Path) -> None:
        self._names[folder] = {
            path.name: None if path.is_dir() else self._contents.get(path.stat().st_ino, b"")
            for path in folder.iterdir()
        }

    def _restore(self, folder: Path) -> None:
        for name, content in self._names.get(folder, {}).items():
            if content is None:
                (folder / name).mkdir()
                self._restore(folder / name)
            else:
                (folder / name).write_bytes(content)


_ACTIVE: list[FailingDisk] = []
_HOOKED: list[bool] = []


def _install_hook() -> None:
    """Audit hooks stay for the process's life, so there is one."""
    if not _HOOKED:
        _HOOKED.append(True)
        sys.addaudithook(lambda event, arguments: [disk.saw(event, arguments) for disk in _ACTIVE] and None)
