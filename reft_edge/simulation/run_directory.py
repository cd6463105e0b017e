"""The folder of an emulated federation: settings, keys and data, as a person would have written them.

    <run>/provisioning/                  the authority, and what it made for broker and coordinator
    <run>/federation.toml                the coordinator's settings; results and memory under federation/
    <run>/data/{public,test}.npz         the coordinator's data
    <run>/devices/<board>/               what would lie on the device, for each board:
        agent.toml, data.npz             its settings and samples
        identity.key, identity.pem, ...  who it is and whom it obeys
        spool/                           the agent's own
    <run>/logs/<process>.log, broker/broker.log

Everything needed lies inside, so any of the processes can be started again by hand.

A board is emulated by the limits in its agent.toml: its agent measures this machine, as every agent measures its own,
and then trains no faster and with no more memory than the board's reference profile allows.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import tomli_w

from reft_edge.data_files import shared_folder
from reft_edge.errors import ConfigError, ResourceError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, Digits, write_part

if TYPE_CHECKING:
    from reft_edge.simulation.trust import TrustedBroker

FEDERATION = "digits"
FEDERATION_FILE = "federation.toml"
RESULTS = "federation"
"""Folder of the coordinator's results and memory."""

MARKER = ".reft-edge-demo"
"""Lies in every folder that we made, so that only such a folder is ever emptied."""

HOLDOUT_FRACTION = 0.1
"""Of a device's samples; they tell what its training brought."""


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is emulated, and how it trains. Defaults were chosen by measurement in the loop of
    `tests/coordinator/test_loop_digits.py`."""

    boards: tuple[str, ...] = ("raspberry-pi-zero-2-w", "raspberry-pi-3b-plus", "jetson-nano", "raspberry-pi-5")
    rounds: int = 5
    local_epochs: int = 8
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    deadline_s: float = 5.6
    """Only the fastest board can train the whole model in this time, and the slowest not even half of it."""
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    alpha: float = 0.5
    """Of the Dirichlet distribution by which classes are divided."""
    soak_s: float = 1.0
    """Nobody predicts here, so there is nothing to watch."""
    seed: int = 0


def prepare(directory: Path, options: DemoOptions, digits: Digits, trusted: TrustedBroker) -> list[Path]:
    """Write settings and data into `directory`, and enrol the boards; returns the agents' settings files, a board each.

    Raises `ConfigError` for an unknown board and `ResourceError` when the disk refuses.
    """
    profiles = {board: DeviceProfile.read(find_board(board)) for board in options.boards}
    write_part(directory / "data" / "public.npz", digits.public, labelled=False)
    write_part(directory / "data" / "test.npz", digits.test)
    try:
        _write_toml(directory / FEDERATION_FILE, federation_table(options, trusted.coordinator_tables()))
        agents = []
        for (board, profile), part in zip(profiles.items(), digits.devices, strict=True):
            device = directory / "devices" / board
            write_part(device / "data.npz", part)
            enrolled = trusted.enrol(board, device)
            agents.append(_write_toml(device / "agent.toml", agent_table(enrolled, profile)))
    except OSError as exc:
        raise ResourceError(f"{directory} cannot be written: {exc.strerror or exc}") from exc
    return agents


def federation_table(options: DemoOptions, provisioned: Mapping[str, Any]) -> dict[str, Any]:
    """federation.toml: what was `provisioned`, and what is trained."""
    return {
        **provisioned,
        "rounds": options.rounds,
        "seed": options.seed,
        "deadline_s": options.deadline_s,
        "grace_s": 30.0,
        "quorum": 0.75,
        "min_devices": len(options.boards),
        "enrol_wait_s": 240.0,  # agents measure the machine first, which on a busy one takes minutes
        "settle_s": 0.0,
        "model": {
            "name": "digits_cnn",
            "input_shape": list(INPUT_SHAPE),
            "n_outputs": N_CLASSES,
            "optimizer": {"name": "sgd", "momentum": options.momentum},
        },
        "training": {
            "local_epochs": options.local_epochs,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "schedule": "cosine",
        },
        "planning": {"ratios": list(options.ratios)},
        "data": {
            "public": {"path": "data/public.npz", "labelled": False},
            "test": {"path": "data/test.npz"},
        },
        "deployment": {"soak_s": options.soak_s},
        "output": {"directory": RESULTS},
    }


def agent_table(enrolled: Mapping[str, Any], profile: DeviceProfile) -> dict[str, Any]:
    """agent.toml of an emulated board: what its enrolment says, and this machine, slowed and short of memory."""
    return {
        **enrolled,
        "data": {"path": "data.npz", "holdout_fraction": HOLDOUT_FRACTION},
        "limits": {
            "training_flops_per_s": profile.planning_flops_per_s,
            "memory_bytes": int(profile.planning_memory_bytes),
            "threads": 1,
        },
    }


def find_board(board: str) -> Path:
    """The reference profile of a board. Raises `ConfigError`."""
    folder = shared_folder("device_profiles")
    path = folder / f"{board}.toml"
    if not path.is_file():
        raise ConfigError(f"no profile of the board {board!r} in {folder}")
    return path


def make_empty(directory: Path) -> Path:
    """Create `directory`, or empty one that an earlier demo made; returns its absolute path.

    Raises `ConfigError` when it holds something else.
    """
    target = directory.resolve()
    try:
        if target.is_dir() and any(target.iterdir()):
            if not (target / MARKER).is_file():
                raise ConfigError(f"{target} is not empty and was not made by a demo; choose another --output")
            shutil.rmtree(target)
        target.mkdir(parents=True, exist_ok=True)
        (target / MARKER).write_text("This folder is emptied by the next demo that writes here.\n", encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--output {target} cannot be used: {exc.strerror or exc}") from exc
    return target


def _write_toml(path: Path, table: Mapping[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def log_path(directory: Path, process: str) -> Path:
    return directory / "logs" / f"{process}.log"
