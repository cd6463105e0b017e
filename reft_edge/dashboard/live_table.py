"""A table element whose rows change cell by cell: what travels to the browser is what is new, not the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nicegui.element import Element

from reft_edge.dashboard.rows import Column, Row, Value

ROWS_AT_FIRST = 300
"""Of a longer table the rest is shown on request."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """From some rows to others."""

    changed: list[tuple[str, Row]] = field(default_factory=list)
    """Key and fields that differ."""
    added: list[tuple[int, Row]] = field(default_factory=list)
    """Place and row, by place, once those that are gone are out."""
    gone: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.changed or self.added or self.gone)


def differences(before: Sequence[Row], after: Sequence[Row]) -> Changes | None:
    """What makes `after` of `before`; None when rows that stay have changed their order."""
    old = {str(row["key"]): row for row in before}
    new = {str(row["key"]): row for row in after}
    if [key for key in old if key in new] != [key for key in new if key in old]:
        return None
    return Changes(
        changed=[
            (key, fields) for key, row in new.items() if key in old and (fields := _changed_fields(old[key], row))
        ],
        added=[(place, row) for place, row in enumerate(after) if str(row["key"]) not in old],
        gone=[key for key in old if key not in new],
    )


def _changed_fields(before: Row, after: Row) -> dict[str, Value]:
    gone: dict[str, Value] = {name: None for name in before if name not in after}
    return gone | {name: value for name, value in after.items() if name not in before or before[name] != value}


class LiveTable(Element, component="live_table.js"):
    """Rows by their `key`, in the columns' order; what is given as words is shown as words.

    `lanes`: buttons above that count rows by their `lane`, and show one lane alone.
    """

    def __init__(self, title: str, columns: Sequence[Column], *, nothing: str, lanes: bool = False) -> None:
        super().__init__()
        self._shown: list[Row] = []
        self._props["title"] = title
        self._props["columns"] = list(columns)
        self._props["rows"] = []
        self._props["nothing"] = nothing
        self._props["lanes"] = lanes
        self._props["atFirst"] = ROWS_AT_FIRST
        self._props["clock"] = time.time()

    def show(self, rows: list[Row]) -> None:
        """Make these the rows."""
        changes = differences(self._shown, rows)
        if changes is not None and not changes:
            return
        self._shown = rows
        if changes is None or not self.client.has_socket_connection:
            self._props["rows"] = rows
            return
        with self._props.suspend_updates():
            self._props["rows"] = rows  # for whoever asks for the whole element
        self.run_method("patch", changes.changed, changes.added, changes.gone)
