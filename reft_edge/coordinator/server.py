"""The coordinator: begin or resume a run, play its rounds, export, end.

    prepare (model, data) -> open the store -> choose the run -> connect -> for every round: wait for devices, plan,
    play -> close the devices' tasks -> export -> finished

Whatever ends the process, the store and the broker's retained tasks are enough to go on: start it again.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec

from reft_edge.coordinator import events
from reft_edge.coordinator.catalogue import Catalogue
from reft_edge.coordinator.deploying.standing import StandingDeployments, kept_blobs
from reft_edge.coordinator.event_log import EVENTS_FILE, EventLog, read_log
from reft_edge.coordinator.exporting import Exporter
from reft_edge.coordinator.file_metadata import Origin
from reft_edge.coordinator.fleet import Fleet
from reft_edge.coordinator.learning import Learner, metric_records
from reft_edge.coordinator.network import Network
from reft_edge.coordinator.parts import RunParts
from reft_edge.coordinator.preparation import Preparation
from reft_edge.coordinator.records import ExportRecord, MetricRecord, QuarantineRecord, RunRecord, UpdateRecord
from reft_edge.coordinator.rejected import RejectedUpdates, note_name
from reft_edge.coordinator.report.record import RejectedUpdate, gather, to_json
from reft_edge.coordinator.rounds import Phase
from reft_edge.coordinator.run_files import BLOBS
from reft_edge.coordinator.session import Session
from reft_edge.coordinator.store import Store
from reft_edge.coordinator.trust import DeviceKeys
from reft_edge.errors import ConfigError, FederationError, ResourceError
from reft_edge.wire.blobs import BlobStore

CONNECT_TIMEOUT_S = 10.0
"""A broker that was started together with us is there by then; a wrong address should not take longer to be told."""

FAREWELL_S = 60.0
"""For a broker that is away at the end of a run to come back: reconnecting takes up to 30 s. What devices keep of a run
they forget when they hear that it is over."""

REJECTED = "rejected"
"""Folder in the output directory: updates of no use, for a person to look at."""

MODELS = "models"
REPORT = "report"
"""In a run's folder: exported models, and the report as .json and .html."""


_log = logging.getLogger(__name__)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to, for `--json`."""

    run: str
    federation: str
    rounds: int
    metrics: list[MetricRecord]
    updates: dict[str, int]
    """Number of updates in each state."""
    rejected: list[RejectedUpdate]
    quarantined: list[QuarantineRecord]
    """Devices that get no tasks now, whichever run it was that they misbehaved in."""
    exports: list[ExportRecord]
    directory: str
    already_finished: bool = False

    def final(self, name: str) -> float | None:
        """The last measured value of a metric, for example `accuracy`."""
        values = [metric.value for metric in self.metrics if metric.name == name]
        return values[-1] if values else None


class Coordinator:
    """One process's work on one federation. Use `run` once.

    `clock` gives Unix time in seconds.
    """

    def __init__(
        self,
        preparation: Preparation,
        *,
        listener: events.Listener = events.ignore,
        new_run: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._preparation = preparation
        self._settings = preparation.settings
        self._listener = listener
        self._new_run = new_run
        self._clock = clock
        self._superseded: str | None = None
        """A run that was left unfinished for this one; its devices still hold its tasks."""

    def run(self) -> Summary:
        """Bring the run to its end. Raises `ReftError`; may be interrupted and run again at any moment."""
        directory = self._preparation.directory
        with closing(Store(directory)) as store:
            record, resumed = self._choose_run(store)
            if record.state == "finished":
                summary = self._summary(store, record, already_finished=True)
                self._listener(_finished(summary))
                return summary
            return self._work(store, record, resumed=resumed)

    # Choosing the run.

    def _choose_run(self, store: Store) -> tuple[RunRecord, bool]:
        """The run to work on, and whether it was begun before. Raises `ConfigError` when it no longer fits."""
        latest = store.latest_run(self._settings.federation)
        if latest is None or self._new_run:
            self._superseded = latest.run if latest is not None and latest.state != "finished" else None
            return self._begin_run(store), False
        if latest.settings_digest != self._preparation.digest:
            raise ConfigError(
                f"run {latest.run} was begun with another model, seed or data; "
                "undo that change to go on, or give --new-run to begin anew"
            )
        if latest.state == "finished" and _n_closed(store, latest.run) >= self._settings.rounds:
            return latest, True
        store.set_run_state(latest.run, "active")
        return msgspec.structs.replace(latest, state="active"), True

    def _begin_run(self, store: Store) -> RunRecord:
        learner = self._learner()
        record = RunRecord(
            run=f"{time.strftime('%Y%m%d', time.gmtime(self._clock()))}-{secrets.token_hex(4)}",
            federation=self._settings.federation,
            settings_digest=self._preparation.digest,
            created_at=self._clock(),
            weights=learner.save(),
        )
        store.create_run(record)
        store.save_metrics(record.run, metric_records(learner.evaluate("initial"), round_number=0))
        return record

    # Working on it.

    def _work(self, store: Store, record: RunRecord, *, resumed: bool) -> Summary:
        """Work on a run that has not finished, and keep what is told about it."""
        directory = self._directory(record.run)
        with EventLog(directory, self._listener, clock=self._clock) as listener:
            self._play(store, record, listener, resumed=resumed)
            summary = self._summary(store, record)
            finished = _finished(summary)
            _write_report(directory, finished)  # before anybody is told, because then it is looked for
            listener(finished)
        return summary

    def _play(self, store: Store, record: RunRecord, listener: events.Listener, *, resumed: bool) -> None:
        blobs = self._blobs()
        keys = self._device_keys()
        federation = self._settings.federation
        network = Network(
            self._settings.broker.resolved_in(self._preparation.base_dir),
            federation=federation,
            blobs=blobs,
            max_parallel_uploads=self._settings.max_parallel_uploads,
            keys=keys,
        )
        parts = RunParts(
            run=record.run,
            settings=self._settings,
            store=store,
            blobs=blobs,
            catalogue=Catalogue(self._preparation.workshop(), run=record.run, store=store, blobs=blobs),
            learner=self._learner(),
            network=network,
            standing=StandingDeployments(store=store, network=network, blobs=blobs, federation=federation),
            fleet=Fleet(device for device in store.devices() if keys is None or keys.recall(device)),
            rejected=self._rejected(),
            listener=listener,
            clock=self._clock,
        )
        self._tell_started(parts, resumed=resumed)
        parts.standing.offer()
        # Where no round was ever planned, a typo is likely; a run that was interrupted waits until the broker is back.
        parts.network.start(wait_s=None if store.rounds(record.run) else CONNECT_TIMEOUT_S)
        try:
            self._play_and_export(parts)
        except FederationError as exc:
            store.set_run_state(record.run, "failed", reason=str(exc), ended_at=self._clock())
            raise
        finally:
            parts.network.stop()

    def _play_and_export(self, parts: RunParts) -> None:
        session = Session(parts)
        if self._superseded is not None:
            session.close_devices(self._superseded)
        session.play_rounds()
        session.close_devices(parts.run)
        self._export(parts)
        session.close_devices(parts.run)  # again: the broker may have been killed meanwhile, and have forgotten it
        if not parts.network.wait_until_said(FAREWELL_S):
            _log.warning("the broker is away; devices will not hear that the run is over until the next one begins")
        # A process that was killed as the last round closed has left that round's updates.
        deployed = kept_blobs(parts.store, self._settings.federation)
        parts.blobs.sweep(parts.catalogue.blobs | {parts.store.weights(parts.run).sha256} | deployed)
        parts.store.set_run_state(parts.run, "finished", ended_at=self._clock())

    def _export(self, parts: RunParts) -> None:
        exporter = Exporter(
            whole=parts.catalogue.variant(0.0),
            global_tensors=parts.learner.read(parts.store.weights(parts.run)),
            workshop=self._preparation.workshop(),
            blobs=parts.blobs,
            options=self._preparation.options,
            directory=self._directory(parts.run) / MODELS,
            origin=Origin(federation=self._settings.federation, run=parts.run, classes=self._settings.model.classes),
        )
        used = sorted({assignment.variant for assignment in parts.store.history(parts.run)})
        for exported in exporter.export([parts.catalogue.named(name) for name in used]):
            parts.store.save_export(parts.run, exported)
            parts.listener(events.Exported(name=exported.name, path=exported.path, values=exported.values))

    def _device_keys(self) -> DeviceKeys | None:
        """Whom we believe; None, with a warning where it matters, when nothing is signed."""
        if self._preparation.trust is not None:
            return DeviceKeys(self._preparation.trust, clock=self._clock)
        broker = self._settings.broker
        if not broker.is_on_this_machine:
            _log.warning("no [trust] in the settings: whoever reaches broker %s can speak for devices", broker.address)
        return None

    def _directory(self, run: str) -> Path:
        """Where a run's results go."""
        return self._preparation.directory / run

    def _learner(self) -> Learner:
        preparation = self._preparation
        return Learner(preparation.fresh_model(), self._blobs(), preparation.options, preparation.workshop().module)

    def _blobs(self) -> BlobStore:
        return BlobStore(self._preparation.directory / BLOBS)

    def _tell_started(self, parts: RunParts, *, resumed: bool) -> None:
        n_closed = _n_closed(parts.store, parts.run)
        parts.listener(
            events.Started(
                run=parts.run,
                federation=self._settings.federation,
                resumed=resumed,
                round=min(n_closed + 1, self._settings.rounds),
                rounds=self._settings.rounds,
                model=self._settings.model.name,
                parameters=sum(parameter.numel() for parameter in parts.learner.model.parameters()),
                global_bytes=parts.learner.n_bytes,
            )
        )

    def _summary(self, store: Store, record: RunRecord, *, already_finished: bool = False) -> Summary:
        return Summary(
            run=record.run,
            federation=record.federation,
            rounds=_n_closed(store, record.run),
            metrics=store.metrics(record.run),
            updates=store.count_updates(record.run),
            rejected=[self._describe(record.run, item) for item in store.updates(record.run, state="rejected")],
            quarantined=store.quarantined(),
            exports=store.exports(record.run),
            directory=str(self._directory(record.run)),
            already_finished=already_finished,
        )

    def _rejected(self) -> RejectedUpdates:
        return RejectedUpdates(self._preparation.directory / REJECTED, self._settings.rejection)

    def _describe(self, run: str, update: UpdateRecord) -> RejectedUpdate:
        blob = update.manifest.blob
        return RejectedUpdate(
            device=update.device,
            round=update.round,
            reason=update.reason,
            up_bytes=blob.size_bytes,
            kept=self._rejected().note_path(note_name(run, update.round, update.device, blob.sha256)),
        )


def _n_closed(store: Store, run: str) -> int:
    return sum(record.phase == Phase.CLOSED.value for record in store.rounds(run))


def _finished(summary: Summary) -> events.Finished:
    return events.Finished(
        run=summary.run,
        rounds=summary.rounds,
        accuracy=summary.final("accuracy"),
        mse=summary.final("mse"),
        updates=summary.updates,
        directory=summary.directory,
    )


def _write_report(directory: Path, finished: events.Finished) -> None:
    """The run's figures as JSON and as one page. Raises `ResourceError`."""
    from reft_edge.coordinator.report.page import to_html  # plots: a sixth of all imports, and wanted at the end only

    report = gather([*read_log(directory / EVENTS_FILE), finished])
    try:
        (directory / f"{REPORT}.json").write_bytes(to_json(report))
        (directory / f"{REPORT}.html").write_text(to_html(report), encoding="utf-8")
    except OSError as exc:
        raise ResourceError(f"{directory}: the report cannot be written: {exc.strerror or exc}") from exc
