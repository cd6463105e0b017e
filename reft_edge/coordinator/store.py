"""What survives the coordinator: one SQLite file, read and written through value objects.

After `kill -9` at any moment the run goes on from here. Three rules make that so:

- Each method is one transaction, and a round's phase changes in the same transaction as what the phase means: the set
  of updates that count, or the blob with the merged weights (which is on disk before).
- An update is recorded, as `offered`, before the first of its blocks is asked for. So whenever its blob is complete
  on disk the row is there too, and the device's copy is not needed any more.
- Everything is idempotent under (task, update hash), and a task is one device in one round of one run.

One process owns a store at a time: opening takes a lock that the kernel releases with the process. Beside it others may
open it `shared`, to read, and to change the quarantine, which the owner looks at before each plan. SQLite runs in WAL
mode with full synchronization, because a receipt makes a device delete its copy.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeVar

import msgspec
from sqlalchemy import Connection, Table, and_, create_engine, event, exists, func, literal, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator import tables
from reft_edge.coordinator.records import (
    STAGES,
    AssignmentRecord,
    DeviceRecord,
    ExportRecord,
    MergedMemory,
    MetricRecord,
    QuarantineRecord,
    Remembered,
    RoundKey,
    RoundRecord,
    RunRecord,
    RunState,
    TaskOwner,
    UpdateRecord,
    UpdateState,
    VariantRecord,
)
from reft_edge.coordinator.rounds import Participant, Phase, Round, RoundRules, Standing
from reft_edge.errors import FederationError, ResourceError
from reft_edge.wire.messages import WeightsRef

Record = TypeVar("Record", bound=msgspec.Struct)

DATABASE_FILE = "coordinator.sqlite"
LOCK_FILE = "coordinator.lock"

LOCK_ATTEMPTS = 5
LOCK_PAUSE_S = 0.05
"""Whoever asks `is_at_work` holds the lock for a moment."""

SEQUENCE = "messages"
"""Row of the numbers that tasks carry."""


class Store:
    """An open database in `directory`, which is created. Use it from one thread; `close` it.

    `shared`: beside the process that owns it; it must be there.
    Raises `FederationError` when another process has it open, it was written by another version, or a shared one is not
    there; `ResourceError` when the disk is full or cannot be used.
    """

    def __init__(self, directory: Path, *, shared: bool = False) -> None:
        if shared and not (directory / DATABASE_FILE).is_file():
            raise FederationError(f"{directory} has no store yet; the coordinator makes it when it is first started")
        self._lock = None if shared else _lock(directory)
        self._engine = create_engine(f"sqlite:///{directory / DATABASE_FILE}")
        event.listen(self._engine, "connect", _configure)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._prepare()
            undo.pop_all()

    def close(self) -> None:
        self._engine.dispose()
        if self._lock is not None:
            self._lock.close()

    # --- runs ---

    def create_run(self, record: RunRecord) -> None:
        with self._transaction() as connection:
            connection.execute(insert(tables.runs).values(**_columns(record)))

    def runs(self, federation: str) -> list[RunRecord]:
        """All runs of a federation, the latest first."""
        table = tables.runs
        query = select(table).where(table.c.federation == federation).order_by(table.c.created_at.desc())
        return self._read(query, RunRecord)

    def latest_run(self, federation: str) -> RunRecord | None:
        """The run of a federation that was started last."""
        return next(iter(self.runs(federation)), None)

    def set_run_state(self, run: str, state: RunState, *, reason: str = "", ended_at: float | None = None) -> None:
        table = tables.runs
        values = {"state": state, "reason": reason, "ended_at": ended_at}
        with self._transaction() as connection:
            connection.execute(update(table).where(table.c.run == run).values(**values))

    def weights(self, run: str) -> BlobRef:
        """The global tensors that the next round starts with, or the open one started with."""
        with self._transaction() as connection:
            found = connection.execute(select(tables.runs.c.weights).where(tables.runs.c.run == run)).scalar_one()
            if not isinstance(found, BlobRef):
                raise FederationError(f"run {run} has no weights in the store; begin anew with --new-run")
            return found

    # --- devices and variants ---

    def save_device(self, record: DeviceRecord) -> None:
        with self._transaction() as connection:
            _upsert(connection, tables.devices, _columns(record))

    def devices(self) -> list[DeviceRecord]:
        return self._read(select(tables.devices).order_by(tables.devices.c.device), DeviceRecord)

    def save_variant(self, run: str, record: VariantRecord) -> None:
        with self._transaction() as connection:
            _upsert(connection, tables.variants, {"run": run, **_columns(record)})

    def variants(self, run: str) -> list[VariantRecord]:
        table = tables.variants
        return self._read(select(table).where(table.c.run == run).order_by(table.c.ratio), VariantRecord)

    def next_sequence(self, now: float) -> int:
        """A number above every one before, over restarts too: Unix milliseconds of `now` (seconds), or the next free.

        What a device has accepted it accepts no more with a lower number, so a task that is played to it again is
        refused. Milliseconds keep the numbers rising when the store is new but the coordinator's key is not.
        """
        table = tables.sequences
        milliseconds = int(now * 1000)
        statement = insert(table).values(name=SEQUENCE, last=milliseconds)
        rising = {"last": func.max(table.c.last + 1, milliseconds)}
        statement = statement.on_conflict_do_update(index_elements=["name"], set_=rising)
        with self._transaction() as connection:
            return int(connection.execute(statement.returning(table.c.last)).scalar_one())

    # --- rounds ---

    def plan_round(self, record: RoundRecord, assignments: Sequence[AssignmentRecord]) -> None:
        """A new round with everything that was decided about it."""
        key = _columns(record.key)
        with self._transaction() as connection:
            connection.execute(insert(tables.rounds).values(**_round_columns(record)))
            for assignment in assignments:
                connection.execute(insert(tables.assignments).values(**key, **_columns(assignment)))

    def save_assignments(self, assignments: Sequence[AssignmentRecord]) -> None:
        """Rewrite assignments of a round that exists."""
        table = tables.assignments
        with self._transaction() as connection:
            for record in assignments:
                connection.execute(update(table).where(table.c.task == record.task).values(**_columns(record)))

    def save_round(
        self,
        key: RoundKey,
        state: Round,
        *,
        devices: Iterable[str] = (),
        updates: Sequence[UpdateRecord] = (),
        merged: BlobRef | None = None,
        memories: Mapping[str, BlobRef] = MappingProxyType({}),
        distilled: BlobRef | None = None,
        metrics: Sequence[MetricRecord] = (),
        closed_at: float | None = None,
    ) -> None:
        """The round's state, and in the same transaction what made it so.

        `devices` are those whose part has changed. `distilled` are also the weights that the
        next round starts with. With `merged`, the updates that count change to state `merged`, and `memories` are what
        is remembered of their devices from then on.
        """
        columns: dict[str, Any] = {
            "phase": state.phase.value,
            "deadline": state.deadline,
            "extensions": state.extensions,
            "reason": state.reason,
        }
        extra = {"merged": merged, "distilled": distilled, "closed_at": closed_at}
        columns |= {name: value for name, value in extra.items() if value is not None}
        with self._transaction() as connection:
            connection.execute(update(tables.rounds).where(*_is(tables.rounds, key)).values(**columns))
            for device in devices:
                part = state.devices[device]
                values = {"standing": part.standing.value, "update": part.update, "reason": part.reason}
                table = tables.assignments
                connection.execute(update(table).where(table.c.task == key.task(device)).values(**values))
            for record in updates:
                _upsert(connection, tables.updates, _update_columns(record))
            if merged is not None:
                _mark_merged(connection, key, state, memories)
            if distilled is not None:
                table = tables.runs
                connection.execute(update(table).where(table.c.run == key.run).values(weights=distilled))
            for metric in metrics:
                _upsert(connection, tables.metrics, {"run": key.run, **_columns(metric)})

    def rounds(self, run: str) -> list[RoundRecord]:
        """All rounds of a run, every attempt, in order."""
        table = tables.rounds
        query = select(table).where(table.c.run == run).order_by(table.c.number, table.c.attempt)
        with self._transaction() as connection:
            return [_round_record(row._asdict()) for row in connection.execute(query)]

    def assignments(self, key: RoundKey) -> list[AssignmentRecord]:
        table = tables.assignments
        return self._read(select(table).where(*_is(table, key)).order_by(table.c.device), AssignmentRecord)

    def history(self, run: str) -> list[AssignmentRecord]:
        """Every assignment of a run, oldest round first."""
        table = tables.assignments
        query = select(table).where(table.c.run == run)
        return self._read(query.order_by(table.c.number, table.c.attempt, table.c.device), AssignmentRecord)

    def bases(self, run: str) -> dict[str, WeightsRef]:
        """Variant -> the weights that it had in the last closed round that used it: what deltas start from."""
        table, rounds = tables.assignments, tables.rounds
        same = [table.c[name] == rounds.c[name] for name in RoundKey.__struct_fields__]
        query = select(table.c.number, table.c.variant, table.c.weights).join(rounds, and_(*same)).distinct()
        query = query.where(table.c.run == run, rounds.c.phase == Phase.CLOSED.value, table.c.weights.is_not(None))
        with self._transaction() as connection:
            rows = connection.execute(query.order_by(table.c.number))
            return {str(variant): weights for _, variant, weights in rows}

    def memories(self, run: str) -> list[MergedMemory]:
        """What is remembered of each device of a run since its last merged update; of those whose compensation asks."""
        updates, tasks = tables.updates, tables.assignments
        columns = (tasks.c.device, tasks.c.number, tasks.c.variant, tasks.c.plan, updates.c.sha256, updates.c.memory)
        query = select(*columns).join(tasks, tasks.c.task == updates.c.task).order_by(tasks.c.number)
        last: dict[str, MergedMemory | None] = {}
        with self._transaction() as connection:
            for row in connection.execute(query.where(tasks.c.run == run, updates.c.state == "merged")):
                device, number, variant, plan, sha256, tensors = row
                last[device] = tensors and MergedMemory(
                    device=device,
                    round=number,
                    variant=variant,
                    method=plan.compensation,
                    remembered=Remembered(update=sha256, tensors=tensors),
                )
        return [memory for memory in last.values() if memory is not None]

    def task_owner(self, task: str) -> TaskOwner | None:
        """Whose task it is, of any run; None for a task that nobody knows."""
        table, rounds = tables.assignments, tables.rounds
        same = [table.c[name] == rounds.c[name] for name in RoundKey.__struct_fields__]
        query = select(table.c.device, table.c.number, rounds.c.started_at).join(rounds, and_(*same))
        with self._transaction() as connection:
            row = connection.execute(query.where(table.c.task == task)).one_or_none()
            return None if row is None else TaskOwner(device=str(row[0]), round=int(row[1]), started_at=float(row[2]))

    def save_failure(self, task: str, failure: str) -> None:
        """The kind of failure that a device named, perhaps after its round was over."""
        table = tables.assignments
        with self._transaction() as connection:
            connection.execute(update(table).where(table.c.task == task).values(failure=failure))

    def load_round(self, record: RoundRecord, rules: RoundRules) -> Round:
        """The state machine's value as it was saved last."""
        return Round(
            rules=rules,
            devices={
                assignment.device: Participant(
                    standing=Standing(assignment.standing), update=assignment.update, reason=assignment.reason
                )
                for assignment in self.assignments(record.key)
            },
            phase=Phase(record.phase),
            deadline=record.deadline,
            extensions=record.extensions,
            reason=record.reason,
        )

    # --- updates ---

    def save_update(self, record: UpdateRecord) -> None:
        """Insert, or bring an update to a new state."""
        with self._transaction() as connection:
            _upsert(connection, tables.updates, _update_columns(record))

    def update(self, task: str, sha256: str) -> UpdateRecord | None:
        table = tables.updates
        query = select(table).where(table.c.task == task, table.c.sha256 == sha256)
        return next(iter(self._read(query, UpdateRecord)), None)

    def updates(self, run: str, *, state: UpdateState | None = None) -> list[UpdateRecord]:
        """Updates of a run, in order of round and device."""
        table, tasks = tables.updates, tables.assignments
        query = select(table).join(tasks, tasks.c.task == table.c.task).where(tasks.c.run == run)
        if state is not None:
            query = query.where(table.c.state == state)
        return self._read(query.order_by(table.c.round, table.c.device, table.c.sha256), UpdateRecord)

    def count_announced(self, task: str) -> int:
        """How many different updates were announced for a task."""
        table = tables.updates
        with self._transaction() as connection:
            query = select(func.count()).select_from(table).where(table.c.task == task)
            return int(connection.execute(query).scalar_one())

    def count_updates(self, run: str) -> dict[str, int]:
        """Number of updates in each state."""
        table, tasks = tables.updates, tables.assignments
        query = select(table.c.state, func.count()).join(tasks, tasks.c.task == table.c.task)
        with self._transaction() as connection:
            rows = connection.execute(query.where(tasks.c.run == run).group_by(table.c.state))
            return {str(state): int(count) for state, count in rows}

    # --- quarantine ---

    def quarantine(self, record: QuarantineRecord) -> bool:
        """Put a device into quarantine; False, and nothing changes, when it is there already."""
        table = tables.quarantine
        columns = _columns(record)
        # One statement, so that two processes cannot both find it missing.
        absent = ~exists().where(table.c.device == record.device, table.c.lifted_at.is_(None))
        values = select(*(literal(columns[column.name], column.type) for column in table.columns)).where(absent)
        with self._transaction() as connection:
            inserted = connection.execute(insert(table).from_select(list(table.columns.keys()), values))
            return bool(inserted.rowcount)

    def lift(self, device: str, *, now: float) -> bool:
        """End a device's quarantine; its rejected updates until `now` are forgiven. False when it was in none."""
        table = tables.quarantine
        chosen = (table.c.device == device, table.c.lifted_at.is_(None))
        with self._transaction() as connection:
            return bool(connection.execute(update(table).where(*chosen).values(lifted_at=now)).rowcount)

    def quarantined(self) -> list[QuarantineRecord]:
        """Devices that get no tasks now, by name."""
        table = tables.quarantine
        return self._read(select(table).where(table.c.lifted_at.is_(None)).order_by(table.c.device), QuarantineRecord)

    def rejections_in_a_row(self) -> dict[str, list[str]]:
        """Device -> why its last tasks' updates were rejected, oldest first, since one was merged or it was lifted.

        Over all runs; one reason a task, however many useless updates were sent for it. What was refused, late or a
        duplicate says nothing.
        """
        table, quarantine = tables.updates, tables.quarantine
        forgiven = select(func.max(quarantine.c.lifted_at)).where(quarantine.c.device == table.c.device)
        later = table.c.at > func.coalesce(forgiven.scalar_subquery(), 0.0)
        columns = (table.c.device, table.c.task, table.c.state, table.c.reason)
        ever = table.c.device.in_(select(table.c.device).where(table.c.state == "rejected"))  # few, of many rows
        query = select(*columns).where(table.c.state.in_(("merged", "rejected")), ever, later).order_by(table.c.at)
        found: dict[str, dict[str, str]] = {}
        with self._transaction() as connection:
            for device, task, state, reason in connection.execute(query):
                if state == "merged":
                    found.pop(device, None)
                else:
                    found.setdefault(device, {})[task] = reason
        return {device: list(tasks.values()) for device, tasks in found.items()}

    # --- results ---

    def save_metrics(self, run: str, metrics: Sequence[MetricRecord]) -> None:
        with self._transaction() as connection:
            for metric in metrics:
                _upsert(connection, tables.metrics, {"run": run, **_columns(metric)})

    def metrics(self, run: str) -> list[MetricRecord]:
        """In the order in which they came to be."""
        table = tables.metrics
        found = self._read(select(table).where(table.c.run == run), MetricRecord)
        return sorted(found, key=lambda metric: (metric.round, STAGES.index(metric.stage), metric.name))

    def save_export(self, run: str, record: ExportRecord) -> None:
        with self._transaction() as connection:
            _upsert(connection, tables.exports, {"run": run, **_columns(record)})

    def exports(self, run: str) -> list[ExportRecord]:
        table = tables.exports
        return self._read(select(table).where(table.c.run == run).order_by(table.c.name), ExportRecord)

    # --- the database ---

    def _prepare(self) -> None:
        with self._transaction() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version not in (0, tables.SCHEMA):
                raise FederationError(
                    f"the store has schema {version}, this reft-edge reads {tables.SCHEMA}; change [output]"
                )
            if self._lock is None:
                return
            tables.schema.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {tables.SCHEMA}")

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as exc:
            cause = str(exc).splitlines()[0]
            raise ResourceError(
                f"the coordinator's store cannot be used: {cause}; check disk space and rights"
            ) from exc

    def _read(self, query: Any, kind: type[Record]) -> list[Record]:
        fields = kind.__struct_fields__
        with self._transaction() as connection:
            rows = connection.execute(query).mappings()
            return [kind(**{name: row[name] for name in fields}) for row in rows]


def is_at_work(directory: Path) -> bool:
    """Whether a process owns the store in `directory`."""
    try:
        with (directory / LOCK_FILE).open("r", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody ever opened it
        return False
    return False


def _lock(directory: Path) -> IO[str]:
    """Hold the store's lock file, for as long as it is open."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / LOCK_FILE).open("w", encoding="utf-8")
    except OSError as exc:
        raise ResourceError(f"{directory} cannot be written: {exc.strerror or exc}; set [output] directory") from exc
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return handle
    handle.close()
    raise FederationError(f"another coordinator is at work in {directory}; stop it first")


def _configure(connection: Any, _: object) -> None:
    """SQLite's settings are those of a connection, not of the file."""
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 5000"):
        connection.execute(f"PRAGMA {pragma}")


def _columns(record: msgspec.Struct) -> dict[str, Any]:
    return msgspec.structs.asdict(record)


def _update_columns(record: UpdateRecord) -> dict[str, Any]:
    return {"sha256": record.manifest.blob.sha256, **_columns(record)}


def _round_columns(record: RoundRecord) -> dict[str, Any]:
    columns = _columns(record)
    key: RoundKey = columns.pop("key")
    return {**_columns(key), **columns}


def _round_record(row: dict[str, Any]) -> RoundRecord:
    key = RoundKey(**{name: row.pop(name) for name in RoundKey.__struct_fields__})
    return RoundRecord(key=key, **row)


def _is(table: Table, key: RoundKey) -> list[Any]:
    return [table.c.run == key.run, table.c.number == key.number, table.c.attempt == key.attempt]


def _upsert(connection: Connection, table: Table, values: dict[str, Any]) -> None:
    statement = insert(table).values(**values)
    keys = [column.name for column in table.primary_key]
    changed = {name: statement.excluded[name] for name in values if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))


def _mark_merged(connection: Connection, key: RoundKey, state: Round, memories: Mapping[str, BlobRef]) -> None:
    table = tables.updates
    for device, sha256 in state.counted.items():
        chosen = (table.c.task == key.task(device), table.c.sha256 == sha256)
        connection.execute(update(table).where(*chosen).values(state="merged", memory=memories.get(device)))
