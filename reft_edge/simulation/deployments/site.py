"""The fleet that is deployed to: emulated devices with keys, one broker with TLS, a coordinator that has finished.

    <run>/provisioning/                 the authority, and what it made for broker and coordinator
    <run>/federation.toml, federation/  settings and store: finished runs, whose exports are the versions to deploy
    <run>/board.toml                    what every device can do, so that none measures itself
    <run>/devices/<device>/             agent.toml, data.npz, keys, spool/
    <run>/observer/                     somebody who may read everything at the broker, and say nothing
    <run>/broker/, <run>/logs/

Nothing is trained here. Every device has a part of the digits, enough to hold some out and to check a version on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from reft_edge.agent.settings import AgentSettings
from reft_edge.coordinator.records import DeviceRecord, ExportRecord
from reft_edge.coordinator.store import Store
from reft_edge.errors import ResourceError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.provisioning.directory import Paths
from reft_edge.simulation.brokers import LOOPBACK, RunningBroker, free_port, start_provisioned_broker
from reft_edge.simulation.deployments.versions import HALF, MODEL, WHOLE, put_into_store
from reft_edge.simulation.digits import Digits, write_part
from reft_edge.simulation.run_directory import FEDERATION_FILE, RESULTS
from reft_edge.simulation.trust import TrustedBroker, found_authority
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.messages import ProfileAnnouncement

FEDERATION = "deployments"
OBSERVER = "observer"
BOARD_FILE = "board.toml"

EVERY_CLASS = 100.0
"""Concentration of the Dirichlet distribution by which devices get digits: all have like parts."""

HOLDOUT_FRACTION = 0.4
"""About 20 of a device's 54 samples, where 20 devices share the digits."""

MEMORY_BYTES = 512 * 2**20
"""That a device grants a process of the agent; a check of these models takes 60 to 80 MiB."""

_FIRST_RUN_AT = 1_700_000_000.0
"""Unix time; the others follow by seconds."""

_ACCESS = f"\nuser {OBSERVER}\ntopic read reft/#\ntopic read $SYS/#\n"
_STATISTICS = "\nsys_interval 1\n"
"""The broker's own counters come every second in place of every ten."""


class SiteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How large it is, and how it deploys."""

    devices: int = 20
    ratios: tuple[float, ...] = (WHOLE, HALF)
    """Of what the devices trained, by turns."""
    soak_s: float = 2.0
    max_latency_s: float = 0.1
    """Of one sample, 95th percentile, that devices accept: they share a few cores here."""

    absent_s: float = 120.0
    """After how long a device that is away is not waited for."""

    canary_devices: tuple[str, ...] = ()
    """Empty: a tenth of the devices."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"board-{number:02}" for number in range(1, self.devices + 1))


@dataclass(frozen=True, kw_only=True)
class Site:
    """A prepared folder, and the broker that runs there."""

    directory: Path
    options: SiteOptions
    broker: RunningBroker
    observer: BrokerSettings
    """How the observer connects."""

    @property
    def devices(self) -> tuple[str, ...]:
        return self.options.names

    @property
    def ratios(self) -> dict[str, float]:
        """What each device trained in every run."""
        return dict(zip(self.devices, itertools.cycle(self.options.ratios), strict=False))

    @property
    def results(self) -> Path:
        return self.directory / RESULTS

    @property
    def settings_file(self) -> Path:
        return self.directory / FEDERATION_FILE

    def agent_file(self, device: str) -> Path:
        return self.directory / "devices" / device / "agent.toml"

    def spool(self, device: str) -> Path:
        return self.agent_file(device).parent / "spool"


@contextmanager
def open_site(
    directory: Path, options: SiteOptions, digits: Digits, versions: Mapping[str, Sequence[ExportRecord]]
) -> Iterator[Site]:
    """Write everything into the new folder `directory`, and run its broker for the length of the block.

    `versions` become finished runs, the last one being the latest. Raises `BrokerError`, `ConfigError` and
    `ResourceError`.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True)
    port = free_port()
    provisioned = found_authority(directory, FEDERATION, host=LOOPBACK, port=port)
    _let_observe(provisioned)
    with start_provisioned_broker(
        provisioned.broker_configuration, directory=directory / "broker", port=port
    ) as broker:
        trusted = TrustedBroker(broker=broker.settings, provisioned=provisioned, mutual_tls=True)
        observer = _write(directory, options, digits, trusted)
        site = Site(directory=directory, options=options, broker=broker, observer=observer)
        for number, (version, exports) in enumerate(versions.items()):
            put_into_store(
                directory / RESULTS, FEDERATION, version, exports, devices=site.ratios, at=_FIRST_RUN_AT + number
            )
        _remember_devices(site)
        yield site


def _let_observe(provisioned: Paths) -> None:
    """Raises `ResourceError`."""
    files = {provisioned.broker_configuration: _STATISTICS, provisioned.broker / "reft-edge.acl": _ACCESS}
    for path, more in files.items():
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(more)
        except OSError as exc:
            raise ResourceError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _write(directory: Path, options: SiteOptions, digits: Digits, trusted: TrustedBroker) -> BrokerSettings:
    """Settings, keys and data; returns how the observer connects."""
    write_part(directory / "data" / "public.npz", digits.public, labelled=False)
    write_part(directory / "data" / "test.npz", digits.test)
    tables = {
        directory / FEDERATION_FILE: {**trusted.coordinator_tables(), **_federation_table(options)},
        directory / BOARD_FILE: _board_table(),
    }
    for device, part in zip(options.names, digits.devices, strict=True):
        folder = directory / "devices" / device
        write_part(folder / "data.npz", part)
        tables[folder / "agent.toml"] = {**trusted.enrol(device, folder), **_agent_table()}
    observer = directory / OBSERVER / "agent.toml"
    tables[observer] = {**trusted.enrol(OBSERVER, observer.parent), **_agent_table()}
    for path, table in tables.items():
        try:
            path.write_text(tomli_w.dumps(table), encoding="utf-8")
        except OSError as exc:
            raise ResourceError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    return AgentSettings.read(observer).broker


def _remember_devices(site: Site) -> None:
    """The coordinator has met them all, as one has that has finished a run."""
    announcement = ProfileAnnouncement(profile=DeviceProfile.read(site.directory / BOARD_FILE), training_samples=1)
    with closing(Store(site.results)) as store:
        for device in site.devices:
            certificate = (site.agent_file(device).parent / "identity.pem").read_text(encoding="utf-8")
            store.save_device(
                DeviceRecord(device=device, announcement=announcement, seen_at=_FIRST_RUN_AT, certificate=certificate)
            )


def _federation_table(options: SiteOptions) -> dict[str, Any]:
    return {
        "rounds": 1,
        "absent_s": options.absent_s,
        "model": {"name": MODEL.name, "input_shape": list(MODEL.input_shape), "n_outputs": MODEL.outputs},
        "data": {"public": {"path": "data/public.npz", "labelled": False}, "test": {"path": "data/test.npz"}},
        "output": {"directory": RESULTS},
        "deployment": {
            "canary_devices": list(options.canary_devices),
            "soak_s": options.soak_s,
            "timeout_s": 120.0,
            "rules": {"max_latency_s": options.max_latency_s, "max_metric_drop": 0.2},
        },
    }


def _agent_table() -> dict[str, Any]:
    return {
        "data": {"path": "data.npz", "holdout_fraction": HOLDOUT_FRACTION},
        "limits": {"threads": 1, "memory_bytes": MEMORY_BYTES},
        "profile": {"path": f"../../{BOARD_FILE}"},
    }


def _board_table() -> dict[str, Any]:
    values = {
        "cores": 1.0,
        "clock_hz": 1e9,
        "flops_per_cycle": 8.0,
        "training_flops_per_s": 4e9,
        "memory_total_bytes": 1e9,
        "worker_start_s": 1.0,
    }
    quantities = {name: {"value": value, "basis": "specified"} for name, value in values.items()}
    return {"name": "board", **quantities}
