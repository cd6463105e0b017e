"""Which faults a seed means. Pure: the same seed, devices and kinds give the same script."""

from __future__ import annotations

import random
from collections.abc import Sequence

from reft_edge.simulation.faults.words import COORDINATOR, COSTS_A_TASK, LASTING, Fault, Kind, Moment, Script

QUORUM = 0.6
"""Where a fault may cost a device its task: the others go on without it."""

COORDINATOR_EVENTS = ("planned", "round_started", "round_merged", "distilling", "round_closed")
DEVICE_PHASES = ("reading", "fetching", "training", "uploading")

_LONGEST_DELAY_S = 0.6
"""About what a device's training takes, or the coordinator's work between two of its events."""

_LONG_PAUSE_SHARE = 0.2
_SHORT_PAUSES_S = (0.1, 4.0)
_LONG_PAUSES_S = (8.0, 12.0)
"""Beyond the keep-alive, so that the broker gives the client up and publishes its last will."""

_MOST_FAULTS = 3


def draw(seed: int, *, devices: Sequence[str], rounds: int, kinds: Sequence[Kind]) -> Script:
    """One to three faults. With one kind only, that kind."""
    rng = random.Random(f"faults {seed}")
    chosen = [rng.choice(kinds) for _ in range(rng.randint(1, _MOST_FAULTS))]
    faults: list[Fault] = []
    for kind in chosen:
        if kind in LASTING and any(fault.kind in LASTING for fault in faults):
            continue  # a process has one way to the broker
        faults.append(_fault(rng, kind, devices, rounds))
    quorum = QUORUM if any(fault.kind in COSTS_A_TASK for fault in faults) else 1.0
    return Script(seed=seed, quorum=quorum, faults=tuple(faults))


def _fault(rng: random.Random, kind: Kind, devices: Sequence[str], rounds: int) -> Fault:
    device, number = rng.choice(devices), rng.randint(1, rounds)
    pause_s = rng.uniform(*(_LONG_PAUSES_S if rng.random() < _LONG_PAUSE_SHARE else _SHORT_PAUSES_S))
    match kind:
        case "kill-agent" | "freeze-agent" | "cut-device" | "disk-full":
            moment = _at_device(rng, device, number, DEVICE_PHASES)
        case "kill-worker" | "freeze-worker" | "out-of-memory":
            moment = _at_device(rng, device, number, ("training",))
        case "kill-coordinator" | "freeze-coordinator" | "cut-coordinator":
            moment, device = _at_coordinator(rng, number, len(devices)), ""
        case "kill-broker" | "freeze-broker" | "cut-all":
            at_device = _at_device(rng, device, number, DEVICE_PHASES)
            at_coordinator = _at_coordinator(rng, number, len(devices))
            at_random = Moment(who="clock", delay_s=rng.uniform(1.0, 20.0))
            moment, device = rng.choice((at_device, at_coordinator, at_random)), ""
        case "disorder":
            moment, device, pause_s = Moment(who="clock"), rng.choice((device, "")), 0.0
        case "poor-link":
            moment, pause_s = Moment(who="clock"), 0.0
    if kind in ("kill-worker", "out-of-memory"):
        pause_s = 0.0
    silent = kind.startswith("cut") and rng.random() < 0.5
    return Fault(kind=kind, moment=moment, device=device, pause_s=round(pause_s, 2), silent=silent)


def _at_device(rng: random.Random, device: str, number: int, phases: Sequence[str]) -> Moment:
    return Moment(who=device, what=rng.choice(phases), round=number, delay_s=_delay(rng))


def _at_coordinator(rng: random.Random, number: int, n_devices: int) -> Moment:
    updates = tuple(f"update {nth}" for nth in range(1, n_devices + 1))
    what = rng.choice((*COORDINATOR_EVENTS, *updates))
    return Moment(who=COORDINATOR, what=what, round=number, delay_s=_delay(rng))


def _delay(rng: random.Random) -> float:
    """Mostly at once: what follows an event at once is what breaks most easily."""
    return round(rng.choice((0.0, rng.uniform(0.0, 0.05), rng.uniform(0.0, _LONGEST_DELAY_S))), 3)
