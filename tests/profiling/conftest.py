"""A tree of files in place of a board's /proc and /sys; psutil reads its /proc too, by its own setting for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

Plant: TypeAlias = Callable[[dict[str, str]], Path]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Writes files under one root, named by their path below it; returns the root."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
        return tmp_path

    return write
