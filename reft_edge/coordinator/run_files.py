"""A federation's runs as they lie on disk, for those who look at one beside the coordinator, or after it.

Nothing here writes, and nothing needs the coordinator to be at work.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from reft_edge.coordinator.event_log import EVENTS_FILE, read_log
from reft_edge.coordinator.events import Event
from reft_edge.coordinator.records import DeviceRecord, QuarantineRecord, RunRecord
from reft_edge.coordinator.settings import load_federation
from reft_edge.coordinator.store import Store, is_at_work
from reft_edge.errors import ConfigError, FederationError


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run, and what the store knows of the fleet now."""

    record: RunRecord
    directory: Path
    """Of the run: events, models, report."""
    at_work: bool
    """Whether a coordinator process owns the store."""
    devices: list[DeviceRecord]
    quarantined: list[QuarantineRecord]

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
    settings = load_federation(settings_file)
    results = settings_file.resolve().parent / settings.output.directory
    with closing(Store(results, shared=True)) as store:
        record = _choose(store.runs(settings.federation), run, settings.federation)
        return RunFiles(
            record=record,
            directory=results / record.run,
            at_work=is_at_work(results),
            devices=store.devices(),
            quarantined=store.quarantined(),
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
