"""`DataDescription`: the numbers about a device's data that leave the device; and when they must be counted again.

Loads no numpy: the agent's daemon announces the numbers that its worker counted.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from reft_edge.data.settings import DataSettings


class DataDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a device says about its data."""

    training_samples: int
    holdout_samples: int
    input_shape: tuple[int, ...] = ()
    """One sample's shape; empty when pictures differ in size and the model's shape will decide."""
    n_classes: int | None = None
    """Classes that the data know; None for regression."""
    classes: tuple[str, ...] = ()
    """Their names, which stay on the device."""
    pictures: bool = False
    """Pictures are converted to whatever shape the model takes."""


def fingerprint(settings: DataSettings, *, base_dir: Path) -> str | None:
    """Changes whenever the settings, or name, size or time of any file change; None for a function: nobody can know."""
    if settings.function:
        return None
    lines = [msgspec.json.encode(settings).decode()]
    root = base_dir / settings.path
    try:
        if root.is_file():
            lines.append(_line(root))
        for folder, subfolders, files in os.walk(root):
            subfolders.sort()
            lines.extend(_line(Path(folder, name)) for name in sorted(files))
    except OSError:
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _line(path: Path) -> str:
    stat = path.stat()
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
