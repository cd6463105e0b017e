"""A federation's fleet and runs as they lie on disk, for those who look beside the coordinator, or after it.

Nothing here writes, and nothing needs the coordinator to be at work.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from reft_edge.coordinator.database import holder_of
from reft_edge.coordinator.event_log import EVENTS_FILE, read_log
from reft_edge.coordinator.events import Event
from reft_edge.coordinator.records import (
    ConditionRecord,
    DeployedDevice,
    DeploymentRecord,
    DeviceRecord,
    PresenceRecord,
    QuarantineRecord,
    RunRecord,
)
from reft_edge.coordinator.settings import FederationSettings, load_federation
from reft_edge.coordinator.store import Store
from reft_edge.errors import ConfigError, FederationError

BLOBS = "blobs"
"""Folder in the output directory. Beside it lie the store and a folder for each run."""


@dataclass(frozen=True, kw_only=True)
class FleetFiles:
    """What the store knows of the fleet now. It needs no run: a model of one's own may be deployed without one."""

    federation: str
    results: Path
    """The output directory, where the store lies and each run has a folder."""
    at_work: bool
    """Whether a coordinator owns the store, and not a deployment, a roll-back or a monitor, or nobody."""
    watched: bool
    """Whether any of these hears the devices now. If not, presence and conditions are as they were heard last."""
    devices: list[DeviceRecord]
    quarantined: list[QuarantineRecord]
    presence: list[PresenceRecord]
    conditions: list[ConditionRecord]
    deployments: list[DeploymentRecord]
    """The latest first."""
    deployed: list[DeployedDevice]
    """Of the latest deployment."""


@dataclass(frozen=True, kw_only=True)
class RunFiles(FleetFiles):
    """One run beside that."""

    record: RunRecord
    directory: Path
    """Of the run: events, models, report."""

    @property
    def log(self) -> Path:
        return self.directory / EVENTS_FILE

    def events(self) -> list[Event]:
        return read_log(self.log)


def find_run(settings_file: Path, run: str | None = None) -> RunFiles:
    """The federation's latest run, or the one that is named.

    Raises `ConfigError` for settings that are wrong and a run that is not there, `FederationError` where nothing was
    ever run.
    """
    settings, results = _results(settings_file)
    with closing(Store(results, shared=True)) as store:
        record = _choose(store.runs(settings.federation), run, settings.federation)
        fleet = _read_fleet(store, settings.federation, results)
    return RunFiles(record=record, directory=results / record.run, **vars(fleet))


def find_fleet(settings_file: Path) -> FleetFiles:
    """The fleet, whether or not there is a run. Raises as `find_run`, `FederationError` where there is no store."""
    settings, results = _results(settings_file)
    with closing(Store(results, shared=True)) as store:
        return _read_fleet(store, settings.federation, results)


def find_latest(settings_file: Path) -> FleetFiles:
    """The latest run; the fleet alone where nobody has trained, but models were deployed or devices heard of.

    Raises as `find_run`.
    """
    settings, results = _results(settings_file)
    with closing(Store(results, shared=True)) as store:
        fleet = _read_fleet(store, settings.federation, results)
        runs = store.runs(settings.federation)
    if not runs and (fleet.deployments or fleet.devices):
        return fleet
    record = _choose(runs, None, settings.federation)
    return RunFiles(record=record, directory=results / record.run, **vars(fleet))


def find_deployed(settings_file: Path, deployment: str) -> list[DeployedDevice]:
    """The devices of any deployment; empty for one that nobody knows. Raises as `find_fleet`."""
    _, results = _results(settings_file)
    with closing(Store(results, shared=True)) as store:
        return store.deployed_devices(deployment)


def _results(settings_file: Path) -> tuple[FederationSettings, Path]:
    """The settings, and where the store lies."""
    settings = load_federation(settings_file)
    return settings, settings_file.resolve().parent / settings.output.directory


def _read_fleet(store: Store, federation: str, results: Path) -> FleetFiles:
    deployments = store.deployments(federation)
    holder = holder_of(results)
    return FleetFiles(
        federation=federation,
        results=results,
        at_work=holder == "coordinator",
        watched=bool(holder),
        devices=store.devices(),
        quarantined=store.quarantined(),
        presence=store.presence(),
        conditions=store.conditions(),
        deployments=deployments,
        deployed=store.deployed_devices(deployments[0].deployment) if deployments else [],
    )


def _choose(runs: list[RunRecord], wanted: str | None, federation: str) -> RunRecord:
    if not runs:
        raise FederationError(f"federation {federation!r} has no run yet; start its coordinator")
    if wanted is None:
        return runs[0]
    for record in runs:
        if record.run == wanted:
            return record
    known = ", ".join(record.run for record in runs[:5])
    raise ConfigError(f"federation {federation!r} has no run {wanted!r}; the latest are: {known}")
