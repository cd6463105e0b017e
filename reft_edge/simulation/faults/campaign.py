"""Many runs: played by several processes, kept in a file as they come, compared with each other, and summed up.

The file has one JSON object a line, an `Outcome` each. A campaign that was interrupted goes on with the runs that the
file does not have.

Two comparisons need more than one run. Where every update counted in the first attempt, the weights must be those of
the undisturbed run; and runs in which the same devices' updates counted in the same rounds must agree with each other.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import FrameType

import msgspec

from reft_edge.errors import ConfigError, ResourceError
from reft_edge.simulation.children import end_with_parent
from reft_edge.simulation.faults import disk
from reft_edge.simulation.faults.drawing import draw
from reft_edge.simulation.faults.play import play
from reft_edge.simulation.faults.site import SiteOptions
from reft_edge.simulation.faults.words import KINDS, Kind, Outcome, Script
from reft_edge.simulation.links import tunnel

UNDISTURBED = -1
"""The seed of the run without faults, which the others are compared with."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a campaign plays."""

    seeds: Sequence[int]
    kinds: Sequence[Kind]
    options: SiteOptions
    directory: Path
    """Runs get folders in it; those of runs in which all was well are removed."""
    jobs: int = 1
    keep: bool = False


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What the runs with faults came to, for people and programs."""

    runs: int
    survived: int
    injected: dict[str, int]
    missed: int
    finished: int
    counted: int
    lost: int
    twice: int
    void: int
    complete: int
    """Runs in which every update counted in the first attempt."""
    equal: int
    """Of these, those with the undisturbed run's weights."""
    alike: int
    """Runs that another run with the same history was compared with."""
    unlike: tuple[str, ...]
    """Histories with more than one result, and their seeds."""
    seconds: float
    complaints: dict[int, tuple[str, ...]]
    """By seed."""

    @property
    def well(self) -> bool:
        return self.survived == self.runs and self.equal == self.complete and not self.unlike


def possible_kinds() -> tuple[tuple[Kind, ...], dict[str, str]]:
    """What can be done on this machine, and why the rest cannot."""
    obstacles = {"disk-full": disk.why_not(), "poor-link": tunnel.available()}
    reasons = {kind: reason for kind, reason in obstacles.items() if reason is not None}
    return tuple(kind for kind in KINDS if kind not in reasons), reasons


def run_campaign(plan: Plan, kept: Sequence[Outcome] = ()) -> Iterator[Outcome]:
    """Play what `kept` lacks, the undisturbed run first; yields outcomes as they come."""
    have = {outcome.seed for outcome in kept}
    seeds = [seed for seed in (UNDISTURBED, *plan.seeds) if seed not in have]
    context = multiprocessing.get_context("spawn")  # the kernel ends a run's processes with the thread that began them
    pool = ProcessPoolExecutor(plan.jobs, mp_context=context, initializer=_begin)
    try:
        futures = [pool.submit(play_seed, seed, plan) for seed in seeds]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def play_seed(seed: int, plan: Plan) -> Outcome:
    """One run of a campaign."""
    name = "undisturbed" if seed == UNDISTURBED else f"seed-{seed}"
    try:
        return play(script_of(seed, plan), plan.directory / name, plan.options, keep=plan.keep)
    except SystemExit as exc:  # the run is cleaned up; the pool would keep this process, and hand it the next one
        os._exit(int(exc.code or 1))


def script_of(seed: int, plan: Plan) -> Script:
    if seed == UNDISTURBED:
        return Script(seed=seed, quorum=1.0, faults=())
    return draw(seed, devices=plan.options.devices, rounds=plan.options.rounds, kinds=plan.kinds)


def read_outcomes(path: Path) -> list[Outcome]:
    """What an earlier campaign has kept; nothing when there is no such file. Raises `ConfigError`."""
    try:
        lines = path.read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Outcome) for line in lines if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as exc:
        raise ConfigError(f"{path} is no file of an earlier campaign: {exc}; choose another") from exc


def keep_outcome(path: Path, outcome: Outcome) -> None:
    """Append it. Raises `ResourceError`."""
    try:
        with path.open("ab") as file:
            file.write(msgspec.json.encode(outcome) + b"\n")
    except OSError as exc:
        raise ResourceError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def summarize(outcomes: Iterable[Outcome]) -> Summary:
    """Of a campaign's runs, in any order."""
    everything = list(outcomes)
    reference = next((outcome for outcome in everything if outcome.seed == UNDISTURBED), None)
    runs = [outcome for outcome in everything if outcome.seed != UNDISTURBED]
    results: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for outcome in everything:
        if outcome.weights:
            results[outcome.history][outcome.weights].append(outcome.seed)
    complete = [outcome for outcome in runs if reference is not None and outcome.history == reference.history]
    return Summary(
        runs=len(runs),
        survived=sum(outcome.survived for outcome in runs),
        injected=dict(sorted(Counter(kind for outcome in runs for kind in outcome.injected).items())),
        missed=sum(len(outcome.missed) for outcome in runs),
        finished=sum(outcome.figures.finished for outcome in runs),
        counted=sum(outcome.figures.counted for outcome in runs),
        lost=sum(outcome.figures.lost for outcome in runs),
        twice=sum(outcome.figures.twice for outcome in runs),
        void=sum(outcome.figures.void for outcome in runs),
        complete=len(complete),
        equal=sum(reference is not None and outcome.weights == reference.weights for outcome in complete),
        alike=sum(len(seeds) for found in results.values() for seeds in found.values() if len(seeds) > 1),
        unlike=tuple(f"{dict(found)}" for found in results.values() if len(found) > 1),
        seconds=round(sum(outcome.seconds for outcome in everything), 1),
        complaints={outcome.seed: outcome.complaints for outcome in everything if outcome.complaints},
    )


def _begin() -> None:
    """In a process that plays: end with the campaign, and in order, so that nothing is left mounted or running."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    if (follow := end_with_parent()) is not None:
        follow()
    logging.getLogger("reft_edge").setLevel(logging.ERROR)  # a broker that is away is no news here


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
