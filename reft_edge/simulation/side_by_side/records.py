"""What a run is asked to be, and what was measured of it: the structs of the benchmark's JSON file.

Bytes are of the devices' interfaces, seconds of wall time unless the name says cpu. Lists go by device, in one order.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from reft_edge.simulation.side_by_side.task import TaskSettings

Side: TypeAlias = Literal["flower", "reft-edge"]

Form: TypeAlias = Literal["insecure", "TLS", "unpruned", "unpruned, insecure", "planned"]
"""Flower: `insecure`, without encryption and signatures, or `TLS`, by which devices know the server. Ours: mutual TLS,
signed tasks and updates, unless it says `insecure`."""


class SideBySideSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of the whole benchmark; a file holds runs of one of these."""

    task: TaskSettings = TaskSettings()
    deadline_s: float = 5.0
    """Of a round, where it is planned: the emulated boards then get different shares of the net."""
    codecs: dict[str, str] = {}
    """Of [training], by key, where they are not the product's defaults."""
    idle_s: float = 60.0
    """For so long devices are watched after the run, while nothing is asked of them: two keep-alives of ours, twenty
    polls of Flower's."""
    rest_s: float = 130.0
    """For so long a device alone is watched before the run: its first round then finds nothing warm, because an agent
    lets its worker go after 120 s without work."""
    sample_s: float = 0.25
    """How often memory is looked at."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run to make."""

    side: Side
    form: Form
    seed: int = 0
    devices: int
    """That are there. One alone has the whole machine's memory to itself, as a device has: libraries' pages are shared
    with nobody on another device."""

    @property
    def words(self) -> str:
        """For people, and for the name of a folder."""
        return f"{self.side} {self.form}, {self.devices} devices, seed {self.seed}".replace("1 devices", "1 device")


FORMS: tuple[tuple[Side, Form], ...] = (
    ("flower", "insecure"),
    ("reft-edge", "unpruned"),
    ("reft-edge", "planned"),
    ("flower", "TLS"),
    ("reft-edge", "unpruned, insecure"),
)
"""In the order of their columns. Goals are about the first three, which run with every seed; the others run once."""

N_MAIN_FORMS = 3
N_ALONE_FORMS = 2


def trials(task: TaskSettings, *, seeds: int, only: Side | None = None) -> list[Trial]:
    """What matters most first. A device alone, once for each side, is among those that run once."""
    main = [(form, seed, task.devices) for seed in range(seeds) for form in FORMS[:N_MAIN_FORMS]]
    alone = [(form, 0, 1) for form in FORMS[:N_ALONE_FORMS]]
    others = [(form, 0, task.devices) for form in FORMS[N_MAIN_FORMS:]]
    wanted = [
        Trial(side=side, form=form, seed=seed, devices=devices)
        for (side, form), seed, devices in [*main, *alone, *others]
    ]
    return [trial for trial in wanted if only in (None, trial.side)]


class RoundUse(msgspec.Struct, frozen=True, kw_only=True):
    """One round, from the end of the last one (the first: from its start) to its own end."""

    seconds: float
    cpu_s: list[float]
    down_bytes: list[int]
    up_bytes: list[int]
    accuracy: float | None = None
    """Of the global model after the round, on the held-out part."""


class IdleUse(msgspec.Struct, frozen=True, kw_only=True):
    """Some time in which nothing was asked of the devices."""

    seconds: float
    processes: list[int]
    pss_bytes: list[int]
    """Medians over the time."""
    cpu_s: list[float]
    down_bytes: list[int]
    up_bytes: list[int]


class SideRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one side."""

    trial: Trial
    security: str
    """What is on, for people."""
    versions: dict[str, str]
    details: dict[str, str]
    """What else one would want to know: how tensors travel, who trains how much."""
    start_cpu_s: list[float]
    """From the start of the device's processes until they had announced themselves and had nothing to do."""
    before: IdleUse
    """Devices have just started and announced themselves."""
    start_seconds: float
    """From asking for the run to the start of its first round; on the server's side."""
    rounds: list[RoundUse]
    after: IdleUse
    """The run is over; the devices wait for the next."""
    run_seconds: float
    """From asking for the run until the devices were left alone again."""
    run_cpu_s: list[float]
    run_down_bytes: list[int]
    run_up_bytes: list[int]
    least_pss_bytes: list[int]
    """In the rounds after the first: a device that waits for the next round."""
    peak_pss_bytes: list[int]
    """In all rounds."""
    accuracy: float
    """Of the final global model, on the held-out part."""
