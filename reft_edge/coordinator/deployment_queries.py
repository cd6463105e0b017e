"""The store's queries about deployments, for `store.Store`, whose methods are the transactions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, delete, func, select, update

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator import tables
from reft_edge.coordinator.database import read, row_of, upsert
from reft_edge.coordinator.records import ENDED_DEPLOYMENTS, DeployedDevice, DeploymentRecord


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


def last_parts(connection: Connection, federation: str, device: str | None = None) -> list[DeployedDevice]:
    """Of each device, or of one, its part in the last deployment that it was asked in. By name."""
    parts, table = tables.deployed_devices, tables.deployments
    query = select(parts, func.max(table.c.started_at)).join(table, parts.c.deployment == table.c.deployment)
    query = query.where(table.c.federation == federation, parts.c.asked_at.is_not(None))
    if device is not None:
        query = query.where(parts.c.device == device)
    # SQLite takes the other columns from the row that has the maximum (https://sqlite.org/lang_select.html).
    return read(connection, query.group_by(parts.c.device).order_by(parts.c.device), DeployedDevice)


def remember_seeded(connection: Connection, blobs: Iterable[BlobRef]) -> None:
    for blob in blobs:
        upsert(connection, tables.seeded, row_of(blob))


def forget_seeded(connection: Connection, blobs: Iterable[BlobRef]) -> None:
    table = tables.seeded
    connection.execute(delete(table).where(table.c.sha256.in_([blob.sha256 for blob in blobs])))


def seeded(connection: Connection) -> list[BlobRef]:
    return read(connection, select(tables.seeded).order_by(tables.seeded.c.sha256), BlobRef)
