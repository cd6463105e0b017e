"""The section of RESULTS.md, and the plot beside it, from the benchmark's JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reft_edge.simulation.results.markdown import Goal, goals, spread, table
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.simulation.side_by_side.records import FORMS, Form, Side, SideBySideSettings, SideRun
from reft_edge.simulation.side_by_side.task import TaskSettings

Column = tuple[Side, Form]

FLOWER: Column = ("flower", "insecure")
UNPRUNED: Column = ("reft-edge", "unpruned")
PLANNED: Column = ("reft-edge", "planned")

NAMES: Mapping[Column, str] = {
    FLOWER: "Flower, no TLS",
    ("flower", "TLS"): "Flower, TLS",
    UNPRUNED: "unpruned",
    PLANNED: "as planned",
    ("reft-edge", "unpruned, insecure"): "unpruned, no TLS",
}

ACCURACY_SLACK = 0.005

_MIB = 1 / 2**20
_KB = 1e-3
_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One row: a number of a run, the mean over its devices where each has one."""

    name: str
    value: Callable[[SideRun], float]
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A goal that is a share of what Flower takes."""

    measure: Measure
    column: Column
    parts: int
    """At most one part of so many."""


def _by_round(of_round: Callable[[int, SideRun], float]) -> Callable[[SideRun], float]:
    return lambda run: statistics.fmean(of_round(number, run) for number in range(len(run.rounds)))


def _cpu_s(number: int, run: SideRun) -> float:
    return statistics.fmean(run.rounds[number].cpu_s)


def _down(number: int, run: SideRun) -> float:
    return statistics.fmean(run.rounds[number].down_bytes)


def _up(number: int, run: SideRun) -> float:
    return statistics.fmean(run.rounds[number].up_bytes)


def _later(of_round: Callable[[int, SideRun], float]) -> Callable[[SideRun], float]:
    """The median of the rounds after the first, where there are some."""
    return lambda run: statistics.median(
        of_round(number, run) for number in range(min(1, len(run.rounds) - 1), len(run.rounds))
    )


def _idle_bytes_an_hour(run: SideRun) -> float:
    idle = run.after
    return statistics.fmean([*idle.down_bytes, *idle.up_bytes]) * 2 * _HOUR_S / idle.seconds


IDLE_PSS = Measure(name="PSS idle, MiB", value=lambda run: statistics.fmean(run.after.pss_bytes), scale=_MIB)
PEAK_PSS = Measure(
    name="PSS at its peak in a round, MiB", value=lambda run: statistics.fmean(run.peak_pss_bytes), scale=_MIB
)
CPU = Measure(name="CPU s a round, all rounds", value=_by_round(_cpu_s), digits=2)
BYTES = Measure(
    name="kB a round, both ways", value=_by_round(lambda number, run: _down(number, run) + _up(number, run)), scale=_KB
)
FIRST_CPU = Measure(name="CPU s, first round", value=lambda run: _cpu_s(0, run), digits=2)
LATER_CPU = Measure(name="CPU s, a later round", value=_later(_cpu_s), digits=2)
START_CPU = Measure(name="CPU s to start and announce", value=lambda run: statistics.fmean(run.start_cpu_s), digits=2)
ACCURACY = Measure(name="accuracy, %", value=lambda run: run.accuracy, scale=100, digits=2)

MEASURES: Sequence[Measure] = (
    IDLE_PSS,
    Measure(name="PSS freshly started, MiB", value=lambda run: statistics.fmean(run.before.pss_bytes), scale=_MIB),
    Measure(
        name="PSS waiting for the next round, MiB", value=lambda run: statistics.fmean(run.least_pss_bytes), scale=_MIB
    ),
    PEAK_PSS,
    CPU,
    FIRST_CPU,
    LATER_CPU,
    START_CPU,
    Measure(
        name="CPU s in an idle hour", value=lambda run: statistics.fmean(run.after.cpu_s) * _HOUR_S / run.after.seconds
    ),
    BYTES,
    Measure(name="kB down, first round", value=lambda run: _down(0, run), scale=_KB),
    Measure(name="kB down, a later round", value=_later(_down), scale=_KB),
    Measure(name="kB up, a later round", value=_later(_up), scale=_KB),
    Measure(name="kB in an idle hour, both ways", value=_idle_bytes_an_hour, scale=_KB),
    Measure(name="seconds, a later round", value=_later(lambda number, run: run.rounds[number].seconds), digits=2),
    Measure(name="seconds, the whole run", value=lambda run: run.run_seconds),
    ACCURACY,
)

BARS: Sequence[Bar] = (
    Bar(measure=IDLE_PSS, column=UNPRUNED, parts=6),
    Bar(measure=PEAK_PSS, column=UNPRUNED, parts=3),
    Bar(measure=CPU, column=UNPRUNED, parts=5),
    Bar(measure=BYTES, column=UNPRUNED, parts=4),
    Bar(measure=BYTES, column=PLANNED, parts=10),
)


def section(path: Path) -> str:
    """Markdown: what was run, the table, the goals."""
    file = ResultsFile.read(path, SideBySideSettings, SideRun)
    fleets = _columns(file, devices=file.settings.task.devices)
    parts = ["## Side by side with Flower", _introduction(file, fleets), _table(MEASURES, fleets)]
    if alone := _columns(file, devices=1):
        parts.append(
            f"One device alone on the machine, so that it shares pages of libraries with no other device; its run "
            f"begins after {file.settings.rest_s:g} s of rest (an agent lets its worker go after 120 s):"
        )
        parts.append(_table((IDLE_PSS, PEAK_PSS, FIRST_CPU, LATER_CPU, START_CPU), alone))
    if FLOWER in fleets and any(column in fleets for column in (UNPRUNED, PLANNED)):
        parts.append(goals(_goals(fleets, alone, rounds=file.settings.task.rounds)))
    parts.append(_details(fleets))
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def draw(path: Path, picture: Path) -> None:
    """What each form of ours takes as a share of what Flower takes, with the goals; nothing without both."""
    from reft_edge.simulation.results.figures import SERIES, drawing

    file = ResultsFile.read(path, SideBySideSettings, SideRun)
    columns = _columns(file, devices=file.settings.task.devices)
    ours = [column for column in columns if column[0] == "reft-edge"]
    if FLOWER not in columns or not ours:
        return
    measures = (IDLE_PSS, PEAK_PSS, CPU, BYTES)
    height = 0.8 / len(ours)
    with drawing(picture, width=7.0, height=3.6) as (axes,):
        for place, (column, series) in enumerate(zip(ours, SERIES, strict=False)):
            shares = [_share(measure, columns, column) for measure in measures]
            rows = [row + (place - (len(ours) - 1) / 2) * height for row in range(len(measures))]
            axes.barh(rows, shares, height=height, label=NAMES[column], **series.bars)
        for bar in BARS:
            row = measures.index(bar.measure)
            axes.plot([1 / bar.parts] * 2, [row - 0.45, row + 0.45], color="black", linewidth=1.5)
            axes.annotate(f"1/{bar.parts}", (1 / bar.parts, row - 0.47), ha="center", va="bottom", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(0.01, 1.0)
        axes.set_xticks([0.01, 0.1, 1.0], ["1/100", "1/10", "1"])
        axes.set_yticks(range(len(measures)), [measure.name for measure in measures])
        axes.invert_yaxis()
        axes.set_xlabel("of what a device with Flower takes (lines: goals)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=len(ours))


def _columns(file: ResultsFile[SideBySideSettings, SideRun], *, devices: int) -> dict[Column, list[SideRun]]:
    """Runs with so many devices, by form, in the order of `FORMS`."""
    found: dict[Column, list[SideRun]] = {}
    for column in FORMS:
        runs = [run for run in file.runs if (run.trial.side, run.trial.form) == column and run.trial.devices == devices]
        if runs:
            found[column] = runs
    return found


def _introduction(file: ResultsFile[SideBySideSettings, SideRun], columns: Mapping[Column, Sequence[SideRun]]) -> str:
    settings, task = file.settings, file.settings.task
    seeds = sorted({run.trial.seed for runs in columns.values() for run in runs})
    return (
        f"Digits, a net of 151,306 parameters (605 kB in float32), {task.devices} devices with equal parts, "
        f"{task.rounds} rounds of {task.local_epochs} epochs, batches of {task.batch_size}, SGD with learning rate "
        f"{task.learning_rate:g} and momentum {task.momentum:g}, one thread, the same initial weights; a fifth held "
        f"out. Seeds {', '.join(map(str, seeds))}. Each side's real processes, all on one machine; each device in a "
        f"network namespace of its own. Figures are of one device, the mean over the devices. CPU time and PSS: of the "
        f"device's process tree, from /proc, processes that have ended included, memory sampled every "
        f"{settings.sample_s:g} s. Bytes: at the device's interface, frames with all headers. Idle: "
        f"{settings.idle_s:g} s after the run; an hour is extrapolated from them. As planned: boards of "
        f"device_profiles/ that grant a tenth of their speed to training, and a deadline of {settings.deadline_s:g} s; "
        f"they keep to it by pausing, which takes wall time and no CPU time.\n"
    )


def _table(measures: Sequence[Measure], columns: Mapping[Column, Sequence[SideRun]]) -> str:
    return table(
        ["", *(NAMES[column] for column in columns)],
        [[measure.name, *(_text(measure, runs) for runs in columns.values())] for measure in measures],
    )


def _text(measure: Measure, runs: Sequence[SideRun]) -> str:
    return spread([measure.value(run) for run in runs], digits=measure.digits, scale=measure.scale)


def _goals(
    columns: Mapping[Column, Sequence[SideRun]], alone: Mapping[Column, Sequence[SideRun]], *, rounds: int
) -> list[Goal]:
    """After fewer than all `rounds`, accuracy says only how far each side has come."""
    found = [_share_goal(bar, columns, NAMES[bar.column]) for bar in BARS if bar.column in columns]
    if FLOWER in alone and UNPRUNED in alone:
        memory = [bar for bar in BARS if bar.measure in (IDLE_PSS, PEAK_PSS)]
        found += [_share_goal(bar, alone, f"{NAMES[bar.column]}, a device alone") for bar in memory]
    for column in (UNPRUNED, PLANNED):
        if column in columns:
            difference = _mean(ACCURACY, columns[column]) - _mean(ACCURACY, columns[FLOWER])
            found.append(
                Goal(
                    what=f"accuracy against Flower's, {NAMES[column]}",
                    wanted=f"at least {-100 * ACCURACY_SLACK:+.1f} points",
                    measured=f"{100 * difference:+.2f}",
                    met=difference >= -ACCURACY_SLACK if rounds >= TaskSettings().rounds else None,
                )
            )
    return found


def _share_goal(bar: Bar, columns: Mapping[Column, Sequence[SideRun]], name: str) -> Goal:
    share = _share(bar.measure, columns, bar.column)
    return Goal(
        what=f"{bar.measure.name}, {name}",
        wanted=f"at most 1/{bar.parts} of Flower's",
        measured=f"1/{1 / share:.1f}",
        met=share <= 1 / bar.parts,
    )


def _share(measure: Measure, columns: Mapping[Column, Sequence[SideRun]], column: Column) -> float:
    return _mean(measure, columns[column]) / _mean(measure, columns[FLOWER])


def _mean(measure: Measure, runs: Sequence[SideRun]) -> float:
    return statistics.fmean(measure.value(run) for run in runs)


def _details(columns: Mapping[Column, Sequence[SideRun]]) -> str:
    """Of the first run of each form: versions and settings that the figures depend on."""
    lines = []
    for column, runs in columns.items():
        run = runs[0]
        versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
        details = "; ".join(f"{name}: {value}" for name, value in run.details.items())
        lines.append(f"- {NAMES[column]}: {versions}; security: {run.security}; {details}")
    return "\n".join(lines) + "\n"
