"""The two ends of a measured transfer, as processes, and what they say."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Literal, Self, TypeAlias, TypeVar

import msgspec

from reft_edge.errors import FederationError
from reft_edge.simulation.children import Child, Children
from reft_edge.simulation.recovery import ends

PATIENCE_S = 240.0
"""Nothing that is measured here takes as long."""

Side: TypeAlias = Literal["device", "coordinator"]
SIDES: tuple[Side, ...] = ("device", "coordinator")
W = TypeVar("W", bound=ends.Word)


class Pair:
    """As a context manager; both are gone at the end of the block. `wrap(side, command)` says how one is started."""

    def __init__(self, directory: Path, *, wrap: Callable[[Side, Sequence[str]], Sequence[str]] | None = None) -> None:
        self._directory = directory
        self._wrap = wrap
        self._children = Children()
        self._running: dict[Side, Child] = {}
        self._orders: dict[Side, ends.DeviceOrders | ends.CoordinatorOrders] = {}
        self._words: dict[Side, SimpleQueue[bytes]] = {side: SimpleQueue() for side in SIDES}

    def start(self, orders: ends.DeviceOrders | ends.CoordinatorOrders) -> None:
        side: Side = "device" if isinstance(orders, ends.DeviceOrders) else "coordinator"
        self._orders[side] = orders
        self._launch(side)

    def restart(self, side: Side) -> None:
        """kill -9, and the same again at once."""
        child = self._running[side]
        child.process.kill()
        child.process.wait()
        self._launch(side)

    def send(self, side: Side, number: signal.Signals) -> None:
        self._running[side].process.send_signal(number)

    def wait(
        self, kind: type[W], *, side: Side, device: str | None = None, meanwhile: Callable[[], None] | None = None
    ) -> W:
        """A side's next word of a kind; others are skipped. `meanwhile` is called every few milliseconds.

        Raises `FederationError` when a transfer ends without its blob, and after `PATIENCE_S`.
        """
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if meanwhile is not None:
                meanwhile()
            try:
                word = ends.parse(self._words[side].get(timeout=0.004 if meanwhile else 0.5))
            except Empty:
                if self._running[side].status is not None:
                    break
                continue
            if isinstance(word, ends.Gone):
                raise FederationError(f"{word.device}: {word.reason}")
            if isinstance(word, kind) and device in (None, word.device):
                return word
        raise FederationError(f"no {kind.__name__.lower()} from the {side}: {self._running[side].obituary()}")

    def stop(self) -> None:
        """Idempotent."""
        self._children.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, side: Side) -> None:
        argument = msgspec.json.encode(self._orders[side]).decode()
        command = [sys.executable, "-m", f"reft_edge.simulation.recovery.{side}_end", argument]
        child = self._children.start(
            side,
            command if self._wrap is None else self._wrap(side, command),
            log_path=self._directory / f"{side}.log",
            directory=self._directory,
            read_output=True,
        )
        self._running[side] = child
        Thread(target=self._listen, args=(side, child), daemon=True).start()

    def _listen(self, side: Side, child: Child) -> None:
        if child.output is None:
            return
        try:
            for line in child.output:
                self._words[side].put(line)
        except ValueError:
            return  # closed, when the child was ended
