"""What the network thread hands to the main thread, in order and bounded, however long the main thread computes.

Of a device's statuses only the last counts, and so of its profiles: while they wait, a later one replaces an earlier.
Reports are dropped when too many wait: progress is of no use any more, and devices repeat what matters until they are
answered. What says that a blob has arrived is kept always; its number is bounded by what was asked for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

MAX_REPORTS = 10_000
"""That wait. A report takes a kilobyte or two."""

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """A queue between two threads. `get` raises `queue.Empty`, as Python's own queues do."""

    def __init__(self, *, max_reports: int = MAX_REPORTS) -> None:
        self._max_reports = max_reports
        self._items: dict[Hashable, Item] = {}
        self._changed = threading.Condition()

    def put(self, item: Item) -> None:
        self._append(object(), item)

    def put_latest(self, key: Hashable, item: Item) -> None:
        """In place of an earlier item with this key that waits; its place is the end."""
        self._append(key, item)

    def put_report(self, item: Item) -> None:
        """Dropped if too much waits."""
        if len(self._items) < self._max_reports:
            self._append(object(), item)

    def get(self, timeout: float | None = None) -> Item:
        """Wait for at most `timeout` seconds, without one for ever. Raises `queue.Empty`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout):
                raise queue.Empty
            return self._items.pop(next(iter(self._items)))

    def _append(self, key: Hashable, item: Item) -> None:
        with self._changed:
            self._items.pop(key, None)
            self._items[key] = item
            self._changed.notify()
