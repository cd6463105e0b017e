"""One run of one side, from an empty folder to its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reft_edge.errors import FederationError
from reft_edge.simulation.children import Children
from reft_edge.simulation.side_by_side import figures
from reft_edge.simulation.side_by_side.flower_side import FlowerSide
from reft_edge.simulation.side_by_side.records import SideBySideSettings, SideRun, Trial
from reft_edge.simulation.side_by_side.reft_side import ReftSide
from reft_edge.simulation.side_by_side.sides import SideInPlay
from reft_edge.simulation.side_by_side.star import Star
from reft_edge.simulation.side_by_side.task import load_task_data
from reft_edge.simulation.side_by_side.watcher import Watcher

SETTLE_S = 5.0
"""After the devices have announced themselves, and after the run: for what they still have to do on their own."""

BEFORE_S = 10.0
"""How long devices among others are watched before the run; what an idle hour takes is measured after it."""


def play(
    directory: Path, settings: SideBySideSettings, trial: Trial, *, flower: Path, say: Callable[[str], None]
) -> SideRun:
    """One run in the empty folder `directory`; whatever was started has ended afterwards.

    `flower`: the folder of its environment. `say` hears what happens. Raises `FederationError`, with the name of a log,
    when something fails.
    """
    with Star(trial.devices) as star, Children() as children:
        side = _prepared(directory, settings, trial, star=star, children=children, flower=flower)
        say("starting")
        roots = side.start_devices()
        with Watcher(roots, star.traffic, sample_s=settings.sample_s) as watcher:
            return _measure(side, watcher, settings, trial, say)


def _prepared(
    directory: Path, settings: SideBySideSettings, trial: Trial, *, star: Star, children: Children, flower: Path
) -> SideInPlay:
    """The side, ready to be started. A device alone has the data that it would have among the others."""
    task = settings.task
    data = load_task_data(task, seed=trial.seed, present=trial.devices)
    if trial.side == "flower":
        return FlowerSide(
            directory,
            star,
            children,
            task=task,
            data=data,
            seed=trial.seed,
            environment=flower,
            tls=trial.form == "TLS",
        )
    deadline_s = settings.deadline_s if trial.form == "planned" else None
    return ReftSide(
        directory,
        star,
        children,
        task=task,
        data=data,
        seed=trial.seed,
        secure=trial.form != "unpruned, insecure",
        deadline_s=deadline_s,
        codecs=settings.codecs,
    )


def _measure(
    side: SideInPlay, watcher: Watcher, settings: SideBySideSettings, trial: Trial, say: Callable[[str], None]
) -> SideRun:
    watcher.watch(SETTLE_S)
    say("idle, before the run")
    before = watcher.watch(settings.rest_s if trial.devices == 1 else BEFORE_S)
    asked = watcher.mark()
    marks = []
    for number in side.run():
        marks.append(watcher.mark())
        say(f"round {number} is over" if number else "the first round begins")
    if len(marks) != settings.task.rounds + 1:
        raise FederationError(f"{trial.words}: {len(marks) - 1} rounds; {settings.task.rounds} were asked for")
    watcher.watch(SETTLE_S)
    say("idle, after the run")
    left = watcher.mark()
    after = watcher.watch(settings.idle_s)
    accuracies = side.accuracies()
    return SideRun(
        trial=trial,
        security=side.security,
        versions=dict(side.versions),
        details=dict(side.details),
        start_cpu_s=[tree.cpu_s for tree in before[0].trees],
        before=figures.idle_use(*before, watcher.samples(*before)),
        start_seconds=marks[0].at - asked.at,
        rounds=[
            figures.round_use(begin, end, accuracy)
            for begin, end, accuracy in zip(marks[:-1], marks[1:], accuracies, strict=True)
        ],
        after=figures.idle_use(*after, watcher.samples(*after)),
        run_seconds=left.at - asked.at - SETTLE_S,
        run_cpu_s=figures.cpu_s(asked, left),
        run_down_bytes=figures.down_bytes(asked, left),
        run_up_bytes=figures.up_bytes(asked, left),
        least_pss_bytes=figures.least_pss_bytes(watcher.samples(marks[1], marks[-1]), trial.devices),
        peak_pss_bytes=figures.peak_pss_bytes(watcher.samples(asked, left), trial.devices),
        accuracy=accuracies[-1],
    )
