"""The coordinator's SQLite file: opened, locked and used in transactions. What is asked of it is `store`'s business.

SQLite runs in WAL mode with full synchronization, because a receipt makes a device delete its copy. The lock is a file
beside the database, which the kernel releases with the process that holds it.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, TypeVar

import msgspec
from sqlalchemy import Connection, Table, create_engine, event, inspect
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import CreateColumn

from reft_edge.coordinator import tables
from reft_edge.errors import FederationError, ResourceError

Record = TypeVar("Record", bound=msgspec.Struct)

Holder: TypeAlias = Literal["coordinator", "operator"]
"""Who owns a store: a coordinator, which trains, or a person's deployment, roll-back or monitor."""

DATABASE_FILE = "coordinator.sqlite"
LOCK_FILE = "coordinator.lock"

LOCK_ATTEMPTS = 5
LOCK_PAUSE_S = 0.05
"""Whoever asks `is_at_work` holds the lock for a moment."""


class Database:
    """An open database in `directory`, which is created. Use it from one thread; `close` it.

    `shared`: beside the process that owns it; it must be there. `holder`: what the owner is, for those who look.
    Raises `FederationError` when another process has it open, it was written by another version, or a shared one is not
    there; `ResourceError` when the disk is full or cannot be used.
    """

    def __init__(self, directory: Path, *, shared: bool = False, holder: Holder = "coordinator") -> None:
        if shared and not (directory / DATABASE_FILE).is_file():
            raise FederationError(f"{directory} has no store yet; the coordinator makes it when it is first started")
        self._lock = None if shared else _lock(directory, holder)
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

    def _prepare(self) -> None:
        with self._transaction() as connection:
            if self._is_ready(connection):
                return
        with self._transaction() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # of two that find an older store, one extends it
            if not self._is_ready(connection):
                tables.schema.create_all(connection)
                _add_columns(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {tables.SCHEMA}")

    def _is_ready(self, connection: Connection) -> bool:
        """Raises `FederationError` for a store that cannot be extended."""
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version not in (0, *tables.EXTENDED_SCHEMAS, tables.SCHEMA):
            raise FederationError(
                f"the store has schema {version}, this reft-edge reads {tables.SCHEMA}; change [output]"
            )
        return version == tables.SCHEMA or (version == 0 and self._lock is None)

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
        with self._transaction() as connection:
            return read(connection, query, kind)


def is_at_work(directory: Path) -> bool:
    """Whether a process owns the store in `directory`."""
    return holder_of(directory) is not None


def holder_of(directory: Path) -> Holder | None:
    """What owns the store in `directory`; None where nobody does."""
    try:
        with (directory / LOCK_FILE).open("r", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return "operator" if handle.read() == "operator" else "coordinator"
    except OSError:  # nobody ever opened it
        return None
    return None


def read(connection: Connection, query: Any, kind: type[Record]) -> list[Record]:
    """The rows of a query as records, whose fields are columns of the same name."""
    fields = kind.__struct_fields__
    return [kind(**{name: row[name] for name in fields}) for row in connection.execute(query).mappings()]


def row_of(record: msgspec.Struct) -> dict[str, Any]:
    """Column -> value."""
    return msgspec.structs.asdict(record)


def upsert(connection: Connection, table: Table, values: dict[str, Any]) -> None:
    """Insert, or replace what has the same primary key."""
    statement = insert(table).values(**values)
    keys = [column.name for column in table.primary_key]
    changed = {name: statement.excluded[name] for name in values if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))


def _add_columns(connection: Connection) -> None:
    """Those that tables of an older store do not have."""
    for table in tables.schema.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                definition = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {definition}")


def _lock(directory: Path, holder: Holder) -> IO[str]:
    """The store's lock file, held by `holder` for as long as it is open."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / LOCK_FILE).open("a", encoding="utf-8")  # what its holder wrote stays
    except OSError as exc:
        raise ResourceError(f"{directory} cannot be written: {exc.strerror or exc}; set [output] directory") from exc
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(LOCK_PAUSE_S)
        else:
            _sign(handle, directory, holder)
            return handle
    handle.close()
    raise FederationError(f"another coordinator is at work in {directory}; stop it first")


def _sign(lock: IO[str], directory: Path, holder: Holder) -> None:
    """Write into the lock file who holds it."""
    try:
        lock.truncate(0)
        lock.write(holder)
        lock.flush()
    except OSError as exc:
        with suppress(OSError):  # it tries to write once more
            lock.close()
        raise ResourceError(f"{directory} cannot be written: {exc.strerror or exc}; make room there") from exc


def _configure(connection: Any, _: object) -> None:
    """SQLite's settings are those of a connection, not of the file."""
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 5000"):
        connection.execute(f"PRAGMA {pragma}")
