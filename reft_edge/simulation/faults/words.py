"""Faults, the moments when they happen, and what became of a run. Value objects; they are also the campaign's file."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import msgspec

COORDINATOR = "coordinator"
"""Its name among the processes; no device is called so."""

Kind: TypeAlias = Literal[
    "kill-agent",
    "kill-worker",
    "kill-coordinator",
    "kill-broker",
    "freeze-agent",
    "freeze-worker",
    "freeze-coordinator",
    "freeze-broker",
    "cut-device",
    "cut-coordinator",
    "cut-all",
    "disk-full",
    "out-of-memory",
    "disorder",
    "poor-link",
]
"""`kill` is SIGKILL, and a start after the pause as a service manager would; `freeze` is SIGSTOP and SIGCONT; `cut`
takes the network away for the pause. `disk-full` fills a device's spool for the pause. `out-of-memory` lets the
worker's next allocation fail. `disorder` duplicates, delays and reorders messages between one device or the coordinator
and the broker, `poor-link` is 1 Mbit/s with 200 ms and 5% loss for one device: both from the start of the run to its
end."""

KINDS: tuple[Kind, ...] = get_args(Kind)

LASTING: frozenset[Kind] = frozenset({"disorder", "poor-link"})
"""There from the start to the end of a run."""

COSTS_A_TASK: frozenset[Kind] = frozenset({"kill-worker", "disk-full", "out-of-memory"})
"""A device may answer these by giving up its task, as it is meant to; its update is then missing in that round."""


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """`delay_s` after `who` has come to `what` in `round`."""

    who: str
    """`coordinator`, a device, or `clock`: the run's start."""
    what: str = ""
    """The coordinator's event (of `update`, which: `update 2`), or the phase of a device's session."""
    round: int = 0
    """0: there are no rounds."""
    delay_s: float = 0.0

    def __str__(self) -> str:
        if self.who == "clock":
            return f"{self.delay_s:.2f} s after the start"
        where = f" in round {self.round}" if self.round else ""
        return f"{self.delay_s:.2f} s after {self.who}'s {self.what}{where}"


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault of a run."""

    kind: Kind
    moment: Moment
    device: str = ""
    """Whose agent, worker, disk or link; empty for the coordinator's and the broker's."""
    pause_s: float = 0.0
    """Until it is undone."""
    silent: bool = False
    """Of a cut: whether nobody is told, as with a pulled cable."""

    def __str__(self) -> str:
        whose = f" {self.device}" if self.device else ""
        lasting = f" for {self.pause_s:.1f} s" if self.pause_s else ""
        return f"{'silent ' if self.silent else ''}{self.kind}{whose}{lasting}, {self.moment}"


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What a seed means."""

    seed: int
    quorum: float
    faults: tuple[Fault, ...]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the updates of a run."""

    finished: int = 0
    """Trainings that ended with an update, by the agents' logs; one a task."""
    counted: int = 0
    """Merged into the global model."""
    lost: int = 0
    """Finished, but neither counted nor of a round that was planned anew."""
    twice: int = 0
    """Tasks of which more than one update counted, and devices that counted twice in a round."""
    void: int = 0
    """Finished in a round that found no quorum, and was planned anew."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    seed: int
    script: Script
    seconds: float
    injected: tuple[str, ...]
    """Of each fault that was really done, its kind."""
    missed: tuple[str, ...]
    """Of each fault whose moment did not come or that found nothing to break, its kind."""
    complaints: tuple[str, ...]
    """What should not be; empty when all is well."""
    figures: Figures
    history: tuple[str, ...]
    """For each round and device what became of its part; runs with the same history must have the same weights."""
    weights: str
    """SHA-256 of the global model's last tensors."""
    directory: str = ""
    """Where the run's files are, if they were kept."""

    @property
    def survived(self) -> bool:
        return not self.complaints
