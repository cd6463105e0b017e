"""What survives the coordinator: one SQLite file, read and written through value objects.

After `kill -9` at any moment the run goes on from here. Three rules make that so:

- Each method is one transaction, and a round's phase changes in the same transaction as what the phase means: the set
  of updates that count, or the blob with the merged weights (which is on disk before).
- An update is recorded, as `offered`, before the first of its blocks is asked for. So whenever its blob is complete
  on disk the row is there too, and the device's copy is not needed any more.
- Everything is idempotent under (task, update hash), and a task is one device in one round of one run.

One process owns a store at a time: opening takes a lock that the kernel releases with the process. Beside it others may
open it `shared`, to read, and to change the quarantine, which the owner looks at before each plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Table, and_, case, exists, func, literal, select, update
from sqlalchemy.dialects.sqlite import insert

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator import deployment_queries, tables
from reft_edge.coordinator.database import Database, row_of, upsert
from reft_edge.coordinator.records import (
    STAGES,
    AssignmentRecord,
    ConditionRecord,
    DeployedDevice,
    DeploymentRecord,
    DeviceRecord,
    ExportRecord,
    MergedMemory,
    MetricRecord,
    PresenceRecord,
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
from reft_edge.errors import FederationError
from reft_edge.wire.messages import WeightsRef

SEQUENCE = "messages"
"""Row of the numbers that tasks and deployments carry."""


class Store(Database):
    """The queries. Opened, locked and closed as any `Database`."""

    # --- runs ---

    def create_run(self, record: RunRecord) -> None:
        with self._transaction() as connection:
            connection.execute(insert(tables.runs).values(**row_of(record)))

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
            upsert(connection, tables.devices, row_of(record))

    def devices(self) -> list[DeviceRecord]:
        return self._read(select(tables.devices).order_by(tables.devices.c.device), DeviceRecord)

    def save_variant(self, run: str, record: VariantRecord) -> None:
        with self._transaction() as connection:
            upsert(connection, tables.variants, {"run": run, **row_of(record)})

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
        """A new round with everything that was decided about it. Tasks that it takes over change to it."""
        key = row_of(record.key)
        with self._transaction() as connection:
            connection.execute(insert(tables.rounds).values(**_round_columns(record)))
            for assignment in assignments:
                upsert(connection, tables.assignments, {**key, **row_of(assignment)})

    def save_assignments(self, assignments: Sequence[AssignmentRecord]) -> None:
        """Rewrite assignments of a round that exists."""
        table = tables.assignments
        with self._transaction() as connection:
            for record in assignments:
                connection.execute(update(table).where(table.c.task == record.task).values(**row_of(record)))

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
                connection.execute(update(tables.assignments).where(*_is_part(key, device)).values(**values))
            for record in updates:
                upsert(connection, tables.updates, _update_columns(record))
            if merged is not None:
                _mark_merged(connection, key, state, memories)
            if distilled is not None:
                table = tables.runs
                connection.execute(update(table).where(table.c.run == key.run).values(weights=distilled))
            for metric in metrics:
                upsert(connection, tables.metrics, {"run": key.run, **row_of(metric)})

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
        attempts = and_(table.c.run == rounds.c.run, table.c.number == rounds.c.number)
        phase = func.max(case((table.c.attempt == rounds.c.attempt, rounds.c.phase)))
        query = select(table.c.device, table.c.number, phase, func.min(rounds.c.started_at)).join(rounds, attempts)
        with self._transaction() as connection:
            row = connection.execute(query.where(table.c.task == task).group_by(table.c.task)).one_or_none()
            if row is None:
                return None
            return TaskOwner(device=str(row[0]), round=int(row[1]), phase=str(row[2]), started_at=float(row[3]))

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
            upsert(connection, tables.updates, _update_columns(record))

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
        columns = row_of(record)
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

    # --- conditions and deployments; the queries are in `deployment_queries` ---

    def save_heard(
        self,
        *,
        devices: Iterable[DeviceRecord] = (),
        presence: Iterable[PresenceRecord] = (),
        conditions: Iterable[ConditionRecord] = (),
    ) -> None:
        """What several devices have told, in one transaction."""
        told = ((tables.devices, devices), (tables.presence, presence), (tables.conditions, conditions))
        with self._transaction() as connection:
            for table, records in told:
                for record in records:
                    upsert(connection, table, row_of(record))

    def conditions(self) -> list[ConditionRecord]:
        """The last that each device told, by name."""
        return self._read(select(tables.conditions).order_by(tables.conditions.c.device), ConditionRecord)

    def presence(self) -> list[PresenceRecord]:
        """Who was there when a coordinator, a deployment or a monitor was last at work, by name."""
        return self._read(select(tables.presence).order_by(tables.presence.c.device), PresenceRecord)

    def standing_parts(self, federation: str) -> list[DeployedDevice]:
        """Of each device its part in the deployment that it goes by, by name: the last that asked it and was not undone
        there to the end."""
        with self._transaction() as connection:
            return deployment_queries.standing_parts(connection, federation)

    def standing_part(self, federation: str, device: str) -> DeployedDevice | None:
        """The same of one device; None where it goes by none."""
        with self._transaction() as connection:
            return next(iter(deployment_queries.standing_parts(connection, federation, device)), None)

    def parts_before(self, federation: str) -> list[DeployedDevice]:
        """Of each device the part that it goes by when the one that it goes by now is undone, by name."""
        with self._transaction() as connection:
            return deployment_queries.parts_before(connection, federation)

    def save_deployed_device(self, record: DeployedDevice) -> None:
        with self._transaction() as connection:
            upsert(connection, tables.deployed_devices, row_of(record))

    def begin_deployment(self, record: DeploymentRecord, devices: Sequence[DeployedDevice]) -> None:
        """A new deployment with everything that was decided about it. Those before it that are open are ended."""
        with self._transaction() as connection:
            deployment_queries.begin(connection, record, devices)

    def save_deployment(self, record: DeploymentRecord, devices: Sequence[DeployedDevice] = ()) -> None:
        """How it stands, and what became of some of its devices, in one transaction."""
        with self._transaction() as connection:
            deployment_queries.save(connection, record, devices)

    def deployments(self, federation: str) -> list[DeploymentRecord]:
        """All deployments of a federation, the latest first."""
        with self._transaction() as connection:
            return deployment_queries.deployments(connection, federation)

    def latest_deployment(self, federation: str) -> DeploymentRecord | None:
        return next(iter(self.deployments(federation)), None)

    def deployed_devices(self, deployment: str) -> list[DeployedDevice]:
        """By name."""
        with self._transaction() as connection:
            return deployment_queries.devices(connection, deployment)

    def remember_seeded(self, blobs: Iterable[BlobRef]) -> None:
        """Blobs of models that are about to be laid at the broker."""
        with self._transaction() as connection:
            deployment_queries.remember_seeded(connection, blobs)

    def forget_seeded(self, blobs: Iterable[BlobRef]) -> None:
        """They were cleared."""
        with self._transaction() as connection:
            deployment_queries.forget_seeded(connection, blobs)

    def seeded(self) -> list[BlobRef]:
        """Blobs of models that lie at the broker, or did."""
        with self._transaction() as connection:
            return deployment_queries.seeded(connection)

    # --- results ---

    def save_metrics(self, run: str, metrics: Sequence[MetricRecord]) -> None:
        with self._transaction() as connection:
            for metric in metrics:
                upsert(connection, tables.metrics, {"run": run, **row_of(metric)})

    def metrics(self, run: str) -> list[MetricRecord]:
        """In the order in which they came to be."""
        table = tables.metrics
        found = self._read(select(table).where(table.c.run == run), MetricRecord)
        return sorted(found, key=lambda metric: (metric.round, STAGES.index(metric.stage), metric.name))

    def save_export(self, run: str, record: ExportRecord) -> None:
        with self._transaction() as connection:
            upsert(connection, tables.exports, {"run": run, **row_of(record)})

    def exports(self, run: str) -> list[ExportRecord]:
        table = tables.exports
        return self._read(select(table).where(table.c.run == run).order_by(table.c.name), ExportRecord)


def _update_columns(record: UpdateRecord) -> dict[str, Any]:
    return {"sha256": record.manifest.blob.sha256, **row_of(record)}


def _round_columns(record: RoundRecord) -> dict[str, Any]:
    columns = row_of(record)
    key: RoundKey = columns.pop("key")
    return {**row_of(key), **columns}


def _round_record(row: dict[str, Any]) -> RoundRecord:
    key = RoundKey(**{name: row.pop(name) for name in RoundKey.__struct_fields__})
    return RoundRecord(key=key, **row)


def _is(table: Table, key: RoundKey) -> list[Any]:
    return [table.c.run == key.run, table.c.number == key.number, table.c.attempt == key.attempt]


def _is_part(key: RoundKey, device: str) -> list[Any]:
    """A device's row among the assignments of a round."""
    return [*_is(tables.assignments, key), tables.assignments.c.device == device]


def _mark_merged(connection: Connection, key: RoundKey, state: Round, memories: Mapping[str, BlobRef]) -> None:
    table = tables.updates
    for device, sha256 in state.counted.items():
        task = select(tables.assignments.c.task).where(*_is_part(key, device)).scalar_subquery()
        chosen = (table.c.task == task, table.c.sha256 == sha256)
        connection.execute(update(table).where(*chosen).values(state="merged", memory=memories.get(device)))
