"""The federation that is broken: a few devices with a few digits each, and nothing in it that depends on time.

Profiles come from files, the paper's policy plans by FLOP/s alone, and the deadline is far beyond any pause. So a run
in which every update counts has one result, whatever happened on the way. Training is paced so that each device takes
about a second for a round: long enough to be hit.

    <run>/federation.toml, agent-<device>.toml, board-<device>.toml, data/
    <run>/spool/<device>/       mounted with a size of its own where the disk shall be full
    <run>/federation/           the coordinator's results
    <run>/broker/, <run>/logs/, and <run>/keys/ where everybody signs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import tomli_w

from reft_edge.errors import ResourceError
from reft_edge.provisioning.authority import Authority, new_client_key, private_pem, public_pem
from reft_edge.provisioning.files import write_file
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, load_digits_split, write_part
from reft_edge.simulation.faults.words import COORDINATOR
from reft_edge.simulation.run_directory import FEDERATION_FILE, RESULTS

if TYPE_CHECKING:
    from reft_edge.data.dataset import Dataset
    from reft_edge.wire.endpoint import BrokerSettings

FEDERATION = "faults"
KEYS = "keys"
KEEPALIVE_S = 5

_SAMPLES = 72
"""A device's; as many are public and as many are the test set. What is learned from them does not matter here."""

_LIFETIME = timedelta(days=1)
"""Of certificates."""

_EVERY_CLASS = 100.0
"""Concentration of the Dirichlet distribution; this large, all devices have like parts."""

_DEADLINE_S = 400.0
"""Beyond a run's time limit: a round ends because everybody has answered, or the run fails."""


class SiteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How large it is."""

    devices: tuple[str, ...] = ("north", "east", "south")
    rounds: int = 3
    seconds_a_training: float = 1.0
    """How long a device should take for a round's training."""
    signed: bool = False
    """Whether everybody has keys, and believes only what is signed. The result is the same."""


def prepare(directory: Path, options: SiteOptions, *, quorum: float, brokers: Mapping[str, BrokerSettings]) -> None:
    """Write settings and data. `brokers` says how each device, and the coordinator, reaches the broker."""
    digits = load_digits_split(len(options.devices), alpha=_EVERY_CLASS, seed=0)
    write_part(directory / "data" / "public.npz", _few(digits.public), labelled=False)
    write_part(directory / "data" / "test.npz", _few(digits.test))
    settings = {FEDERATION_FILE: _federation_table(options, quorum, brokers[COORDINATOR])}
    for index, (device, part) in enumerate(zip(options.devices, digits.devices, strict=True)):
        write_part(directory / "data" / f"{device}.npz", _few(part))
        # The last has half the speed, and so gets a smaller variant.
        share = 0.5 if index == len(options.devices) - 1 else 1.0
        settings[f"board-{device}.toml"] = _board_table(device, _flops_per_s(options) * share)
        settings[f"agent-{device}.toml"] = _agent_table(device, brokers[device], _flops_per_s(options) * share)
    if options.signed:
        for name, trust in write_keys(directory / KEYS, options.devices).items():
            settings[name]["trust"] = trust
    try:
        for name, table in settings.items():
            (directory / name).write_text(tomli_w.dumps(table), encoding="utf-8")
    except OSError as exc:
        raise ResourceError(f"{directory} cannot be written: {exc.strerror or exc}") from exc


def write_keys(folder: Path, devices: Sequence[str]) -> dict[str, dict[str, str]]:
    """Keys and certificates for everybody; returns the table [trust] of each settings file. Raises `ResourceError`."""
    now = datetime.now(UTC)
    authority = Authority.create(FEDERATION, lifetime=_LIFETIME, now=now)
    keys = {name: new_client_key() for name in (COORDINATOR, *devices)}
    files = {"ca.pem": authority.certificate_pem, "coordinator.pub": public_pem(keys[COORDINATOR].public_key())}
    for name, key in keys.items():
        files[f"{name}.key"] = private_pem(key)
        files[f"{name}.pem"] = authority.issue_client(name, key.public_key(), lifetime=_LIFETIME, now=now)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content, 0o600)
    tables = {FEDERATION_FILE: {"key_file": f"{KEYS}/{COORDINATOR}.key", "ca_file": f"{KEYS}/ca.pem"}}
    for device in devices:
        tables[f"agent-{device}.toml"] = {
            "key_file": f"{KEYS}/{device}.key",
            "certificate_file": f"{KEYS}/{device}.pem",
            "coordinator_key_file": f"{KEYS}/coordinator.pub",
        }
    return tables


def spool_of(directory: Path, device: str) -> Path:
    return directory / "spool" / device


def results_of(directory: Path) -> Path:
    return directory / RESULTS


def _few(part: Dataset) -> Dataset:
    return part.take(np.arange(_SAMPLES))


def _flops_per_s(options: SiteOptions) -> float:
    """The pace at which `_SAMPLES` take the wanted time: 2.7 million MACs a sample, six operations each in training."""
    return _SAMPLES * 2.7e6 * 6 / options.seconds_a_training


def _federation_table(options: SiteOptions, quorum: float, broker: BrokerSettings) -> dict[str, Any]:
    return {
        "federation": FEDERATION,
        "rounds": options.rounds,
        "deadline_s": _DEADLINE_S,
        "absent_s": _DEADLINE_S,
        "quorum": quorum,
        "min_devices": len(options.devices),
        "settle_s": 0.0,
        "broker": _broker_table(broker),
        "model": {"name": "digits_cnn", "input_shape": list(INPUT_SHAPE), "n_outputs": N_CLASSES},
        "training": {"local_epochs": 1, "batch_size": 8},
        "planning": {"policy": "reft", "ratios": [0.0, 0.5, 0.75]},
        "data": {"public": {"path": "data/public.npz", "labelled": False}, "test": {"path": "data/test.npz"}},
        "distillation": {"epochs": 2},
        "output": {"directory": RESULTS},
    }


def _agent_table(device: str, broker: BrokerSettings, flops_per_s: float) -> dict[str, Any]:
    return {
        "device": device,
        "federation": FEDERATION,
        "spool": f"spool/{device}",
        "broker": _broker_table(broker),
        "data": {"path": f"data/{device}.npz"},
        "limits": {"threads": 1, "training_flops_per_s": flops_per_s},
        "profile": {"path": f"board-{device}.toml"},
    }


def _broker_table(broker: BrokerSettings) -> dict[str, Any]:
    return {"host": broker.host, "port": broker.port, "mqtt_version": broker.mqtt_version, "keepalive_s": KEEPALIVE_S}


def _board_table(device: str, flops_per_s: float) -> dict[str, Any]:
    values = {
        "cores": 1.0,
        "clock_hz": 1e9,
        "flops_per_cycle": 8.0,
        "training_flops_per_s": flops_per_s,
        "memory_total_bytes": 4e9,
        "worker_start_s": 1.0,
    }
    quantities = {name: {"value": value, "basis": "specified"} for name, value in values.items()}
    return {"name": f"board-{device}", **quantities}
