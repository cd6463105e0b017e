"""What must be true after a run, whatever happened in it. Everything is read from disk; nothing is asked for its word.

Each function returns complaints: sentences about what should not be. `inspect` puts them together.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from reft_edge.bundle.manifest import Manifest
from reft_edge.coordinator.database import DATABASE_FILE, LOCK_FILE
from reft_edge.coordinator.records import AssignmentRecord, RoundRecord, RunRecord, UpdateRecord, VariantRecord
from reft_edge.coordinator.rounds import ANSWERED, Phase, Standing
from reft_edge.coordinator.run_files import BLOBS
from reft_edge.coordinator.server import REJECTED
from reft_edge.coordinator.store import Store
from reft_edge.simulation.faults.site import FEDERATION, results_of, spool_of
from reft_edge.simulation.faults.words import Figures, Script
from reft_edge.wire.blobs import BlobStore

# A log line may end with the round that it is about.
_DONE = re.compile(r" task (\S+): done(?: \[|$)", re.MULTILINE)
_FULL_DISK = re.compile(r"No space left on device|disk is full|no room for")
_NO_BROKER_YET = re.compile(
    r"coordinator: error: broker \S+ (cannot be reached|does not answer)|: error: nobody listens at"
)

_BROKER_FILES = frozenset({"mosquitto.conf", "mosquitto.db", "broker.log"})
_SPOOL_FILES = frozenset({"lock", "state.json", "data.json", "blobs", "rebuilt", "residuals"})


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The store's content, read once. Only for runs that have begun."""

    run: RunRecord
    rounds: list[RoundRecord]
    assignments: dict[str, AssignmentRecord]
    """By task, of every attempt."""
    rounds_of_tasks: dict[str, RoundRecord]
    updates: list[UpdateRecord]
    variants: list[VariantRecord]

    @property
    def weights(self) -> str:
        return "" if self.run.weights is None else self.run.weights.sha256

    def history(self) -> tuple[str, ...]:
        """What became of each device's part, and what it trained: decides the result."""
        fates = {update.task: update.state for update in self.updates}
        lines = []
        for task, record in self.rounds_of_tasks.items():
            part, key = self.assignments[task], record.key
            fate = fates.get(task, part.standing)
            lines.append(f"{key.number}.{key.attempt} {part.device} x{part.variant} {fate}")
        return tuple(sorted(lines))


def read_ledger(directory: Path) -> Ledger | None:
    """None when no run has begun. Raises `ReftError` when the store cannot be opened."""
    with closing(Store(results_of(directory))) as store:
        run = store.latest_run(FEDERATION)
        if run is None:
            return None
        rounds = store.rounds(run.run)
        parts = {record.key: store.assignments(record.key) for record in rounds}
        return Ledger(
            run=run,
            rounds=rounds,
            assignments={part.task: part for assigned in parts.values() for part in assigned},
            rounds_of_tasks={part.task: record for record in rounds for part in parts[record.key]},
            updates=store.updates(run.run),
            variants=store.variants(run.run),
        )


def inspect(
    directory: Path, ledger: Ledger, *, devices: Sequence[str], rounds: int, script: Script
) -> tuple[Figures, list[str]]:
    """After everybody has ended."""
    figures, lost = _account(directory, ledger, devices)
    complaints = [
        *lost,
        *_check_rounds(ledger, rounds),
        *_check_database(results_of(directory) / DATABASE_FILE),
        *_check_logs(directory / "logs", full_disk=any(fault.kind == "disk-full" for fault in script.faults)),
        *_check_coordinator_files(results_of(directory), ledger),
        *_strangers(directory / "broker", _BROKER_FILES),
    ]
    for device in devices:
        complaints += check_spool(spool_of(directory, device))
    return figures, complaints


# Updates.


def finished_tasks(directory: Path, devices: Sequence[str]) -> set[str]:
    """Tasks whose training ended with an update, as the agents logged."""
    texts = [(directory / "logs" / f"agent-{device}.log").read_text(errors="replace") for device in devices]
    return {task for text in texts for task in _DONE.findall(text)}


def _account(directory: Path, ledger: Ledger, devices: Sequence[str]) -> tuple[Figures, list[str]]:
    finished = finished_tasks(directory, devices)
    merged = Counter(update.task for update in ledger.updates if update.state == "merged")
    void = {task for task, record in ledger.rounds_of_tasks.items() if record.phase == Phase.FAILED.value}
    lost = sorted(finished - merged.keys() - void)
    times = Counter((ledger.rounds_of_tasks[task].key.number, ledger.assignments[task].device) for task in merged)
    twice = [task for task, n in merged.items() if n > 1] + [f"{part}" for part, n in times.items() if n > 1]
    fates = {update.task: f"{update.state} {update.reason}".strip() for update in ledger.updates}
    complaints = [f"the update of task {task} was finished and is lost: {fates.get(task, 'unknown')}" for task in lost]
    complaints += [f"counted twice: {name}" for name in twice]
    complaints += [f"counted, but no agent said so: {task}" for task in sorted(merged.keys() - finished)]
    figures = Figures(
        finished=len(finished), counted=merged.total(), lost=len(lost), twice=len(twice), void=len(finished & void)
    )
    return figures, complaints


def _check_rounds(ledger: Ledger, n_rounds: int) -> list[str]:
    complaints = []
    if ledger.run.state != "finished":
        complaints.append(f"the run is {ledger.run.state}: {ledger.run.reason}")
    closed = [record.key.number for record in ledger.rounds if record.phase == Phase.CLOSED.value]
    if closed != list(range(1, n_rounds + 1)):
        complaints.append(f"closed rounds are {closed}")
    open_ = [record for record in ledger.rounds if record.phase not in (Phase.CLOSED.value, Phase.FAILED.value)]
    complaints += [f"round {record.key.number} is left {record.phase}" for record in open_]
    counted = {(update.task, update.manifest.blob.sha256) for update in ledger.updates if update.state == "merged"}
    for task, record in ledger.rounds_of_tasks.items():
        if record.phase != Phase.CLOSED.value:
            continue
        part, where = ledger.assignments[task], f"round {record.key.number}"
        if Standing(part.standing) not in ANSWERED:
            complaints.append(f"{where} closed while {part.device} was {part.standing}")
        if (part.standing == Standing.UPDATED.value) != ((task, part.update) in counted):
            complaints.append(f"{where}: {part.device} is {part.standing}, and its update is not in the same state")
    for update in ledger.updates:
        if update.state not in ("merged", "late", "rejected", "duplicate") and (
            update.state == "offered" or ledger.rounds_of_tasks[update.task].phase != Phase.FAILED.value
        ):
            complaints.append(f"an update of {update.device} in round {update.round} is left {update.state}")
    return complaints


def _check_database(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        (verdict,) = database.execute("pragma integrity_check").fetchone()
        orphans = database.execute("pragma foreign_key_check").fetchall()
    return [f"{path.name}: {problem}" for problem in ([] if verdict == "ok" else [verdict]) + orphans]


# Files.


def check_spool(spool: Path) -> list[str]:
    """A device that knows that the run is over keeps nothing of it. Empty as soon as that is so."""
    complaints = _strangers(spool, _SPOOL_FILES)
    for name in ("blobs", "rebuilt", "residuals"):
        complaints += _strangers(spool / name, frozenset())
    try:
        state = msgspec.json.decode((spool / "state.json").read_bytes())
    except (OSError, msgspec.MsgspecError) as exc:
        return [*complaints, f"{spool}: state.json: {exc}"]
    return [*complaints, *([f"{spool.name} still has a task"] if state.get("task") is not None else [])]


def _strangers(folder: Path, known: frozenset[str]) -> list[str]:
    return [
        f"left over: {folder.parent.name}/{folder.name}/{path.name}"
        for path in sorted(folder.iterdir())
        if path.name not in known
    ]


def _check_coordinator_files(results: Path, ledger: Ledger) -> list[str]:
    blobs = BlobStore(results / BLOBS)
    needed = {ledger.weights}
    for variant in ledger.variants:
        manifest = Manifest.from_json(blobs.read(variant.manifest))
        refs = (variant.manifest, variant.channels, manifest.training_graph, manifest.inference_graph, manifest.weights)
        needed |= {ref.sha256 for ref in refs}
    complaints = _strangers(results / BLOBS, frozenset(needed))
    complaints += [f"blob {sha256} is missing" for sha256 in sorted(needed) if not blobs.has(sha256)]
    complaints += _strangers(results, frozenset({DATABASE_FILE, LOCK_FILE, BLOBS, REJECTED, ledger.run.run}))
    unfinished = [path for pattern in ("*.tmp", "*.part") for path in (results / ledger.run.run).rglob(pattern)]
    return complaints + [f"left over: {path.relative_to(results)}" for path in unfinished]


def _check_logs(folder: Path, *, full_disk: bool) -> list[str]:
    """Nothing may fail in a way that nobody foresaw. An agent says that its disk is full, when it is; a coordinator
    that never found its broker says so, and is started again."""
    complaints = []
    for path in sorted(folder.iterdir()):
        for line in path.read_text(errors="replace").splitlines():
            bad = "Traceback (most recent call last)" in line or " ERROR " in line or ": error: " in line
            if bad and not (full_disk and _FULL_DISK.search(line)) and not _NO_BROKER_YET.search(line):
                complaints.append(f"{path.name}: {line.strip()[:300]}")
    return complaints
