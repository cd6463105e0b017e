"""The one who measures both sides: devices' process trees and interfaces, at marked moments and regularly in between.

Looking costs time of its own, in this process, not in the watched ones: some milliseconds for each process and sample.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from reft_edge.simulation.side_by_side.processes import TreeUse, measure_tree
from reft_edge.simulation.side_by_side.star import LinkBytes


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """All devices at one moment; `at` is of the monotonic clock. Trees come without memory."""

    at: float
    trees: list[TreeUse]
    links: list[LinkBytes]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One device's tree, with memory."""

    at: float
    device: int
    tree: TreeUse


class Watcher:
    """Watches the process trees below `roots`, one a device. As a context manager, for the length of the block."""

    def __init__(self, roots: Sequence[int], traffic: Callable[[], list[LinkBytes]], *, sample_s: float) -> None:
        self._roots = tuple(roots)
        self._traffic = traffic
        self._sample_s = sample_s
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def mark(self) -> Mark:
        """What has been used until now."""
        trees = [measure_tree(root, memory=False) for root in self._roots]
        return Mark(at=time.monotonic(), trees=trees, links=self._traffic())

    def samples(self, begin: Mark, end: Mark) -> list[Sample]:
        """Those between two marks."""
        return [sample for sample in tuple(self._samples) if begin.at <= sample.at <= end.at]

    def watch(self, seconds: float) -> tuple[Mark, Mark]:
        """Marks at the beginning and at the end of the next `seconds`."""
        begin = self.mark()
        self._stop.wait(seconds)
        return begin, self.mark()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._sample_s, time.monotonic())
            for device, root in enumerate(self._roots):
                tree = measure_tree(root)
                self._samples.append(Sample(at=time.monotonic(), device=device, tree=tree))
