"""One run of one side, from an empty folder to its figures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from reft_edge.errors import FederationError
from reft_edge.simulation.children import Children
from reft_edge.simulation.side_by_side import figures
from reft_edge.simulation.side_by_side.flower_side import FlowerSide
from reft_edge.simulation.side_by_side.records import Form, Side, SideBySideSettings, SideRun
from reft_edge.simulation.side_by_side.reft_side import ReftSide
from reft_edge.simulation.side_by_side.sides import SideInPlay
from reft_edge.simulation.side_by_side.star import Star
from reft_edge.simulation.side_by_side.task import load_task_data
from reft_edge.simulation.side_by_side.watcher import Watcher

SETTLE_S = 5.0
"""After the devices have announced themselves, and after the run: for what they still have to do on their own."""


def play(
    directory: Path,
    settings: SideBySideSettings,
    *,
    side: Side,
    form: Form,
    seed: int,
    flower: Path,
    say: Callable[[str], None],
) -> SideRun:
    """Run `side` once in the empty folder `directory`; whatever was started has ended afterwards.

    `flower`: the folder of its environment. Raises `FederationError`, with the name of a log, when something fails.
    """
    with prepared(directory, settings, side=side, form=form, seed=seed, flower=flower) as (star, in_play):
        say("starting")
        roots = in_play.start_devices()
        with Watcher(roots, star.traffic, sample_s=settings.sample_s) as watcher:
            return _measure(in_play, watcher, settings, side=side, form=form, seed=seed, say=say)


@contextlib.contextmanager
def prepared(
    directory: Path, settings: SideBySideSettings, *, side: Side, form: Form, seed: int, flower: Path
) -> Iterator[tuple[Star, SideInPlay]]:
    """A side that is ready to be started; its processes and its network are gone at the end of the block."""
    task = settings.task
    data = load_task_data(task.devices, seed=seed)
    with Star(task.devices) as star, Children() as children:
        in_play: SideInPlay
        if side == "flower":
            in_play = FlowerSide(directory, star, children, task=task, data=data, seed=seed, environment=flower)
        else:
            in_play = ReftSide(
                directory, star, children, task=task, data=data, seed=seed, form=form, deadline_s=settings.deadline_s
            )
        yield star, in_play


def _measure(
    in_play: SideInPlay,
    watcher: Watcher,
    settings: SideBySideSettings,
    *,
    side: Side,
    form: Form,
    seed: int,
    say: Callable[[str], None],
) -> SideRun:
    watcher.watch(SETTLE_S)
    say("idle, before")
    before = watcher.watch(settings.idle_s)
    asked = watcher.mark()
    marks = []
    for number in in_play.run():
        marks.append(watcher.mark())
        say(f"round {number}" if number else "the first round begins")
    if len(marks) != settings.task.rounds + 1:
        raise FederationError(f"{side} made {len(marks) - 1} rounds; {settings.task.rounds} were asked for")
    watcher.watch(SETTLE_S)
    say("idle, after")
    left = watcher.mark()
    after = watcher.watch(settings.idle_s)
    accuracies = in_play.accuracies()
    n_devices = settings.task.devices
    return SideRun(
        side=side,
        form=form,
        seed=seed,
        security=in_play.security,
        versions=dict(in_play.versions),
        settings=dict(in_play.details),
        start_cpu_s=[tree.cpu_s for tree in before[0].trees],
        before=figures.idle_use(*before, watcher.samples(*before)),
        start_seconds=marks[0].at - asked.at,
        rounds=[
            figures.round_use(begin, end, accuracy)
            for begin, end, accuracy in zip(marks, marks[1:], accuracies, strict=False)
        ],
        after=figures.idle_use(*after, watcher.samples(*after)),
        run_seconds=left.at - asked.at - SETTLE_S,
        run_cpu_s=figures.cpu_s(asked, left),
        run_down_bytes=figures.down_bytes(asked, left),
        run_up_bytes=figures.up_bytes(asked, left),
        least_pss_bytes=figures.least_pss_bytes(watcher.samples(marks[1], marks[-1]), n_devices),
        peak_pss_bytes=figures.peak_pss_bytes(watcher.samples(asked, left), n_devices),
        accuracy=accuracies[-1],
    )
