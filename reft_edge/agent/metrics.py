"""The agent's figures for Prometheus, for who asks for them: [metrics] in agent.toml.

What is so now is looked up when the page is read, in the page's own thread: the daemon does nothing for it. What has
happened is counted as the daemon says it, which costs nothing where nobody asks. Then prometheus-client is not loaded
either; where it is, the idle daemon takes about 1 MiB more. Counters begin at 0 with the process.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.agent.serving.counts import read_counts
from reft_edge.agent.serving.slots import COUNTS, SERVING, Slot, Slots
from reft_edge.agent.session_words import Phase, SessionState
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.supervisor import Supervisor
from reft_edge.metrics_page import serving
from reft_edge.profiling.tree import read_text
from reft_edge.profiling.vitals import Vitals, read_vitals
from reft_edge.wire.deployment import PredictionCounts
from reft_edge.wire.messages import Done, Failed, Refused, Report
from reft_edge.wire.mqtt import MqttLink

if TYPE_CHECKING:
    from prometheus_client import Metric

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The agent at one moment."""

    device: str
    federation: str
    connected: bool
    phase: Phase
    round: int
    """Of the task in hand; 0: none."""
    tasks: Mapping[tuple[str, str], int]
    """How many ended as done, refused or failed; the second word says of what they failed."""
    training_s: float
    steps: int
    received_bytes: int
    sent_bytes: int
    daemon_bytes: int
    worker_bytes: int
    """0 without a worker."""
    vitals: Vitals
    served: Slot | None
    counts: PredictionCounts | None
    """Of what is served; None where nothing is counted."""


class AgentMetrics:
    """Counts what is said with `said`, and from `start` to `stop` serves the page, where the settings name an address.

    `state` gives the session's state as it is now, in any thread.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        spool: Path,
        link: MqttLink,
        supervisor: Supervisor,
        state: Callable[[], SessionState],
    ) -> None:
        self._settings = settings
        self._slots = Slots(spool / SERVING)
        self._link = link
        self._supervisor = supervisor
        self._state = state
        self._tasks = Counter({("done", ""): 0, ("refused", ""): 0, ("failed", "crashed"): 0})
        self._training_s = 0.0
        self._steps = 0
        self._counted: Report | None = None
        self._open = ExitStack()

    def start(self) -> str:
        """The page's URL; empty where none is asked for. Raises `ResourceError` when nobody can listen there."""
        if self._settings.metrics is None:
            return ""
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry()
        registry.register(self)
        url = self._open.enter_context(serving(registry, self._settings.metrics.address))
        logger.info("metrics: %s", url)
        return url

    def stop(self) -> None:
        self._open.close()

    def said(self, report: Report) -> None:
        """Count how a task ended. That is said again and again until somebody has heard it."""
        if not isinstance(report, Done | Refused | Failed) or report == self._counted:
            return
        self._counted = report
        self._tasks[type(report).__name__.lower(), report.kind if isinstance(report, Failed) else ""] += 1
        if isinstance(report, Done):
            self._training_s += report.measured.training_s
            self._steps += report.measured.steps

    def collect(self) -> Iterator[Metric]:
        """What a collector of prometheus-client has."""
        from reft_edge.agent.metric_families import families

        return families(self._look())

    def _look(self) -> Figures:
        state, worker, installed = self._state(), self._supervisor.worker, self._slots.current()
        served = None if installed is None else installed.slot
        return Figures(
            device=self._settings.device,
            federation=self._settings.federation,
            connected=self._link.connected,
            phase=state.phase,
            round=0 if state.task is None or state.phase is Phase.IDLE else state.task.round,
            tasks=dict(self._tasks),
            training_s=self._training_s,
            steps=self._steps,
            received_bytes=self._link.received_bytes,
            sent_bytes=self._link.sent_bytes,
            daemon_bytes=resident_bytes(os.getpid()),
            worker_bytes=0 if worker is None else resident_bytes(worker),
            vitals=read_vitals(),
            served=served,
            counts=None if served is None else self._counted_of(served),
        )

    def _counted_of(self, served: Slot) -> PredictionCounts | None:
        return read_counts(self._slots.root / COUNTS, served.deployment, served.version)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 of one that has ended."""
    words = (read_text(Path(f"/proc/{pid}/statm")) or "0 0").split()
    return int(words[1]) * _PAGE_BYTES
