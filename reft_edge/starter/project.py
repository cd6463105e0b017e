"""Write the starter project into a folder: templates of this package with names filled in, and recordings.

Three machines with different troubles stand for the devices, as in real fleets: one never had a broken bearing.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from reft_edge.errors import ConfigError, ResourceError
from reft_edge.starter.vibration import COLUMNS, STATES, TARGET_COLUMN, WINDOW, write_recording

BROKER_PORT = 18831
"""Not MQTT's own 1883, where a broker may be at work already."""

SEED = 0

N_STRETCHES = 36
"""Of each recording: times 4 windows, 144 samples."""

MACHINES: dict[str, Sequence[str]] = {
    "press-1": ("good", "good", "imbalance"),
    "press-2": ("good", "imbalance", "bearing"),
    "press-3": ("good", "bearing"),
}
"""States that each machine was ever in."""

TEMPLATES = ("README.md", "federation.toml", "model.py", "run")
AGENT_TEMPLATE = "agent.toml"


def write_project(directory: Path, *, federation: str) -> list[Path]:
    """Write everything; returns the files in the order in which a reader wants them.

    Raises `ConfigError` when the folder has something in it, `ResourceError` where it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ConfigError(f"{directory} is not empty; name a new folder")
        written = [_write(directory, name, federation=federation) for name in TEMPLATES]
        for device in MACHINES:
            path = directory / f"{device}.toml"
            path.write_text(_filled(AGENT_TEMPLATE, federation=federation, device=device), encoding="utf-8")
            written.append(path)
        (directory / "data").mkdir()
    except OSError as exc:
        raise ResourceError(f"{directory} cannot be written: {exc.strerror or exc}") from exc
    return written + _write_recordings(directory / "data")


def _write(directory: Path, name: str, *, federation: str) -> Path:
    path = directory / name
    text = _filled(name, federation=federation)
    path.write_text(text, encoding="utf-8")
    if text.startswith("#!"):
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def _filled(name: str, *, federation: str, device: str = "") -> str:
    # The suffix keeps tools from taking templates for the package's own settings and code.
    text = resources.files("reft_edge.starter").joinpath("files", f"{name}.template").read_text(encoding="utf-8")
    return Template(text).substitute(
        federation=federation,
        device=device,
        port=BROKER_PORT,
        window=WINDOW,
        n_columns=len(COLUMNS),
        columns=", ".join(f'"{name}"' for name in COLUMNS),
        target_column=TARGET_COLUMN,
        classes=", ".join(f'"{name}"' for name in STATES),
    )


def _write_recordings(directory: Path) -> list[Path]:
    """One for each machine; one without states to distil on, and one to test on, both of machines all over the range.

    A global model that saw public recordings of one machine would be good on machines like that, and on no other.
    """
    rng = np.random.default_rng(SEED)
    own = np.linspace(-1, 1, len(MACHINES))
    kinds = {**MACHINES, "public": STATES, "test": STATES}
    paths: list[Path] = []
    for index, (name, states) in enumerate(kinds.items()):
        path = directory / f"{name}.csv"
        order = rng.permutation(N_STRETCHES)
        machines = np.full(N_STRETCHES, own[index]) if index < len(own) else rng.uniform(-1, 1, N_STRETCHES)
        stretches = [(states[each % len(states)], machine) for each, machine in zip(order, machines, strict=True)]
        write_recording(path, stretches=stretches, rng=rng, labelled=name != "public")
        paths.append(path)
    return paths
