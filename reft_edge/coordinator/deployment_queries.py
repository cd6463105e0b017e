"""The store's queries about deployments, for `store.Store`, whose methods are the transactions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, func, not_, select, update

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator import tables
from reft_edge.coordinator.database import read, row_of, upsert
from reft_edge.coordinator.records import ENDED_DEPLOYMENTS, GONE_BACK, DeployedDevice, DeploymentRecord


def begin(connection: Connection, record: DeploymentRecord, devices: Sequence[DeployedDevice]) -> None:
    table = tables.deployments
    older = (table.c.federation == record.federation, table.c.ended_at.is_(None))
    open_states = table.c.state.not_in(ENDED_DEPLOYMENTS)
    superseded = {"state": "interrupted", "reason": f"{record.version} was deployed instead"}
    connection.execute(update(table).where(*older, open_states).values(**superseded, since=record.started_at))
    connection.execute(update(table).where(*older).values(ended_at=record.started_at))
    save(connection, record, devices)


def save(connection: Connection, record: DeploymentRecord, devices: Sequence[DeployedDevice]) -> None:
    upsert(connection, tables.deployments, row_of(record))
    for device in devices:
        upsert(connection, tables.deployed_devices, row_of(device))


def deployments(connection: Connection, federation: str) -> list[DeploymentRecord]:
    table = tables.deployments
    query = select(table).where(table.c.federation == federation)
    return read(connection, query.order_by(table.c.started_at.desc(), table.c.deployment), DeploymentRecord)


def devices(connection: Connection, deployment: str) -> list[DeployedDevice]:
    table = tables.deployed_devices
    query = select(table).where(table.c.deployment == deployment).order_by(table.c.device)
    return read(connection, query, DeployedDevice)


def standing_parts(connection: Connection, federation: str, device: str | None = None) -> list[DeployedDevice]:
    """Of each device, or of one, its part in the deployment that it goes by: the last that asked it and was not undone
    there to the end. By name."""
    parts = tables.deployed_devices
    query = _open_parts(federation, parts, func.max(tables.deployments.c.started_at))
    if device is not None:
        query = query.where(parts.c.device == device)
    # SQLite takes the other columns from the row that has the maximum (https://sqlite.org/lang_select.html).
    return read(connection, query.group_by(parts.c.device).order_by(parts.c.device), DeployedDevice)


def parts_before(connection: Connection, federation: str) -> list[DeployedDevice]:
    """Of each device the part that it goes by when the one that it goes by now is undone. By name."""
    parts, started_at = tables.deployed_devices, tables.deployments.c.started_at
    latest = _open_parts(federation, parts.c.device, func.max(started_at).label("at")).group_by(parts.c.device)
    standing = latest.subquery()
    query = _open_parts(federation, parts, func.max(started_at)).join(standing, standing.c.device == parts.c.device)
    query = query.where(started_at < standing.c.at)
    return read(connection, query.group_by(parts.c.device).order_by(parts.c.device), DeployedDevice)


def _open_parts(federation: str, *columns: Any) -> Select[Any]:
    """Columns of parts that a device was asked to take, but for those that it has undone."""
    parts, table = tables.deployed_devices, tables.deployments
    has_gone_back = and_(parts.c.undone, parts.c.state.in_(GONE_BACK))
    query = select(*columns).join(table, parts.c.deployment == table.c.deployment)
    return query.where(table.c.federation == federation, parts.c.asked_at.is_not(None), not_(has_gone_back))


def remember_seeded(connection: Connection, blobs: Iterable[BlobRef]) -> None:
    for blob in blobs:
        upsert(connection, tables.seeded, row_of(blob))


def forget_seeded(connection: Connection, blobs: Iterable[BlobRef]) -> None:
    table = tables.seeded
    connection.execute(delete(table).where(table.c.sha256.in_([blob.sha256 for blob in blobs])))


def seeded(connection: Connection) -> list[BlobRef]:
    return read(connection, select(tables.seeded).order_by(tables.seeded.c.sha256), BlobRef)
