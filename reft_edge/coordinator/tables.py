"""The database schema: the only place where a table or a column is named.

A column has the name of the record field that it keeps (see `records`). Structured values (predictions, manifests) are
JSON in a text column. SQLAlchemy's types are used by `store` alone.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Boolean, Column, Dialect, Float, ForeignKeyConstraint, Integer, MetaData, String, Table, Text
from sqlalchemy.types import TypeDecorator

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator.records import Prediction, ReleasedModel, Remembered
from reft_edge.wire.deployment import Condition, Health, HealthRules
from reft_edge.wire.messages import (
    Measured,
    ProfileAnnouncement,
    TrainingPlan,
    UpdateManifest,
    WeightsDelta,
    WeightsRef,
)

SCHEMA = 5
"""Written to SQLite's `user_version`."""

EXTENDED_SCHEMAS = (3, 4)
"""Older ones whose tables and columns are as they were: what this one adds is created beside them."""


class Json(TypeDecorator[Any]):
    """A msgspec value as JSON text."""

    impl = Text
    cache_ok = True

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002 SQLAlchemy's signature
        return None if value is None else msgspec.json.encode(value, order="deterministic").decode()

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 SQLAlchemy's signature
        return None if value is None else msgspec.json.decode(value, type=self.kind)


schema = MetaData()

runs = Table(
    "runs",
    schema,
    Column("run", String, primary_key=True),
    Column("federation", String, nullable=False),
    Column("settings_digest", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("ended_at", Float),
    Column("weights", Json(BlobRef)),
)

devices = Table(
    "devices",
    schema,
    Column("device", String, primary_key=True),
    Column("announcement", Json(ProfileAnnouncement), nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("certificate", Text, nullable=False),
)

quarantine = Table(
    "quarantine",
    schema,
    Column("device", String, primary_key=True),
    Column("since", Float, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("by", String, nullable=False),
    Column("lifted_at", Float),
)

sequences = Table(
    "sequences",
    schema,
    Column("name", String, primary_key=True),
    Column("last", Integer, nullable=False),
)

variants = Table(
    "variants",
    schema,
    Column("run", String, primary_key=True),
    Column("variant", String, primary_key=True),
    Column("ratio", Float, nullable=False),
    Column("manifest", Json(BlobRef), nullable=False),
    Column("channels", Json(BlobRef), nullable=False),
    ForeignKeyConstraint(["run"], ["runs.run"]),
)

rounds = Table(
    "rounds",
    schema,
    Column("run", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("phase", String, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("deadline", Float),
    Column("extensions", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("closed_at", Float),
    Column("merged", Json(BlobRef)),
    Column("distilled", Json(BlobRef)),
    ForeignKeyConstraint(["run"], ["runs.run"]),
)

assignments = Table(
    "assignments",
    schema,
    Column("task", String, primary_key=True),
    Column("run", String, nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("device", String, nullable=False),
    Column("variant", String, nullable=False),
    Column("ratio", Float, nullable=False),
    Column("prediction", Json(Prediction), nullable=False),
    Column("plan", Json(TrainingPlan), nullable=False),
    Column("bundle", Json(BlobRef)),
    Column("weights", Json(WeightsRef)),
    Column("delta", Json(WeightsDelta)),
    Column("memory", Json(Remembered)),
    Column("broadcast", Boolean, nullable=False),
    Column("standing", String, nullable=False),
    Column("update", String),
    Column("reason", Text, nullable=False),
    Column("failure", String, nullable=False),
    ForeignKeyConstraint(["run", "number", "attempt"], ["rounds.run", "rounds.number", "rounds.attempt"]),
)

updates = Table(
    "updates",
    schema,
    Column("task", String, primary_key=True),
    Column("sha256", String, primary_key=True),
    Column("device", String, nullable=False),
    Column("round", Integer, nullable=False),
    Column("manifest", Json(UpdateManifest), nullable=False),
    Column("measured", Json(Measured), nullable=False),
    Column("state", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("reason", Text, nullable=False),
    Column("memory", Json(BlobRef)),
    ForeignKeyConstraint(["task"], ["assignments.task"]),
)

metrics = Table(
    "metrics",
    schema,
    Column("run", String, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("stage", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("value", Float, nullable=False),
    ForeignKeyConstraint(["run"], ["runs.run"]),
)

exports = Table(
    "exports",
    schema,
    Column("run", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("path", Text, nullable=False),
    Column("sha256", String, nullable=False, server_default=""),
    Column("values", Json(dict[str, float]), nullable=False),
    ForeignKeyConstraint(["run"], ["runs.run"]),
)

conditions = Table(
    "conditions",
    schema,
    Column("device", String, primary_key=True),
    Column("condition", Json(Condition), nullable=False),
    Column("seen_at", Float, nullable=False),
)

presence = Table(
    "presence",
    schema,
    Column("device", String, primary_key=True),
    Column("online", Boolean, nullable=False),
    Column("at", Float, nullable=False),
)

deployments = Table(
    "deployments",
    schema,
    Column("deployment", String, primary_key=True),
    Column("federation", String, nullable=False),
    Column("version", String, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("since", Float, nullable=False),
    Column("ended_at", Float),
    Column("models", Json(tuple[ReleasedModel, ...]), nullable=False),
    Column("classes", Json(tuple[str, ...]), nullable=False),
    Column("rules", Json(HealthRules), nullable=False),
)

deployed_devices = Table(
    "deployed_devices",
    schema,
    Column("deployment", String, primary_key=True),
    Column("device", String, primary_key=True, index=True),
    Column("model", String, nullable=False),
    Column("smaller", String, nullable=False),
    Column("why", Text, nullable=False),
    Column("wave", String, nullable=False),
    Column("undone", Boolean, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("precision", String),
    Column("health", Json(tuple[Health, ...]), nullable=False),
    Column("asked_at", Float),
    Column("answered_at", Float),
    ForeignKeyConstraint(["deployment"], ["deployments.deployment"]),
)

seeded = Table(
    "seeded",
    schema,
    Column("sha256", String, primary_key=True),
    Column("size_bytes", Integer, nullable=False),
)
