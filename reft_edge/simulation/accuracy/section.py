"""The section of RESULTS.md, and the plot beside it, from the benchmark's JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from reft_edge.simulation.accuracy.methods import CENTRAL, FEDAVG, MULTI_ROUND, ONE_SHOT
from reft_edge.simulation.accuracy.records import AccuracyRun, AccuracySettings, Central
from reft_edge.simulation.results.markdown import Goal, goals, spread, table
from reft_edge.simulation.results.results_file import ResultsFile

_DATA = {"cifar10": "CIFAR-10", "pictures": "pictures by class", "digits": "digits"}
_MB = 1e-6

Rows: TypeAlias = Mapping[str, Sequence[AccuracyRun]]
"""Runs of one split by method, in order of the seeds."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A goal for one method, measured against FedAvg on the same seeds."""

    method: str
    words: str
    slack: float
    """Accuracy that it may lack."""
    parts: int
    """It may take one part of so many of FedAvg's bytes."""


BARS = (
    Bar(method=ONE_SHOT, words="within 1 point of FedAvg", slack=0.01, parts=50),
    Bar(method=MULTI_ROUND, words="at or above FedAvg", slack=0.0, parts=20),
)


def section(path: Path) -> str:
    """Markdown: what was run, then for each split the table and the goals."""
    file = ResultsFile.read(path, AccuracySettings, AccuracyRun)
    parts = ["## Accuracy for bytes\n", _introduction(file)]
    for alpha, rows in _splits(file).items():
        parts += [f"### Dirichlet {alpha:g}\n", _table(rows)]
        if FEDAVG in rows:
            parts.append(goals([goal for bar in BARS if bar.method in rows for goal in _goals(bar, rows)]))
    return "\n".join(parts)


def draw(path: Path, picture: Path) -> None:
    """Accuracy against bytes: for each split a panel, for each method a line of means with its spread."""
    from reft_edge.simulation.results.figures import SERIES, drawing

    splits = _splits(ResultsFile.read(path, AccuracySettings, AccuracyRun))
    names = dict.fromkeys(name for rows in splits.values() for name in rows)
    looks = dict(zip(names, SERIES, strict=False))
    with drawing(picture, columns=len(splits), width=5.6) as panels:
        for axes, (alpha, rows) in zip(panels, splits.items(), strict=True):
            for name, runs in rows.items():
                series = looks[name]
                curves = [[point.accuracy * 100 for point in run.points] for run in runs]
                means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                if name == CENTRAL:
                    axes.axhline(means[-1], label=name, color=series.colour, linestyle=series.dash)
                    continue
                sizes = [
                    statistics.fmean(point.total_bytes for point in points) * _MB
                    for points in zip(*(run.points for run in runs), strict=True)
                ]
                axes.plot(sizes, means, label=name, **series.line)
                if len(runs) > 1:
                    spreads = [statistics.stdev(values) for values in zip(*curves, strict=True)]
                    axes.errorbar(sizes, means, yerr=spreads, fmt="none", ecolor=series.colour, alpha=0.4)
            axes.set_xscale("log")
            axes.set_title(f"Dirichlet {alpha:g}")
            axes.set_xlabel("MB for each device, down and up, in all")
            axes.set_ylabel("accuracy, %")
        panels[0].legend(fontsize=8)


def _splits(file: ResultsFile[AccuracySettings, AccuracyRun]) -> dict[float, Rows]:
    """Runs by alpha, the most even split first, and by method, the most bytes first."""
    found: dict[float, Rows] = {}
    for alpha in sorted({run.alpha for run in file.runs}, reverse=True):
        runs = [run for run in file.runs if run.alpha == alpha]
        names = dict.fromkeys(run.method.name for run in runs)
        rows = {name: _of_one_method([run for run in runs if run.method.name == name]) for name in names}
        found[alpha] = dict(sorted(rows.items(), key=lambda row: _mean_bytes(row[1]), reverse=True))
    return found


def _of_one_method(runs: Sequence[AccuracyRun]) -> list[AccuracyRun]:
    """While a changed method is being measured again there are rows of two settings, which make no mean: those that are
    more, and of equally many the new ones."""
    groups: dict[bytes, list[AccuracyRun]] = {}
    for run in runs:
        groups.setdefault(msgspec.json.encode(run.method), []).append(run)
    most = max(reversed(list(groups.values())), key=lambda group: len(group))
    return sorted(most, key=lambda run: run.seed)


def _introduction(file: ResultsFile[AccuracySettings, AccuracyRun]) -> str:
    settings = file.settings
    seeds = sorted({run.seed for run in file.runs})
    ratios = ", ".join(f"{ratio:g}" for ratio in settings.ratios)
    return (
        f"{_DATA[settings.data]}: {settings.n_private:,} private samples on {len(settings.ratios)} devices, "
        f"{settings.n_public:,} public ones without labels, {settings.n_test:,} to test. The net is "
        f"`{settings.model}`; where devices get what they can compute, the shares of channels pruned are {ratios}. "
        f"Bytes: all blobs that a device fetches and sends, graphs and manifests included, mean over the devices. "
        f"FedAvg: unpruned, float32, batch-norm statistics averaged like weights. Seeds "
        f"{', '.join(map(str, seeds))}.\n"
    )


def _table(rows: Rows) -> str:
    fedavg = _mean_bytes(rows[FEDAVG]) if FEDAVG in rows else None
    return table(
        ("method", "accuracy, %", "merged only, %", "MB down", "MB up", "MB in all", "of FedAvg's bytes", "exchanges"),
        [_cells(name, runs, fedavg) for name, runs in rows.items()],
    )


def _cells(name: str, runs: Sequence[AccuracyRun], fedavg_bytes: float | None) -> tuple[str, ...]:
    accuracy = spread([run.last.accuracy for run in runs], scale=100)
    if isinstance(runs[0].method, Central):
        return name, accuracy, "", "", "", "", "", ""
    share = "" if fedavg_bytes is None else f"1/{fedavg_bytes / _mean_bytes(runs):.1f}"
    return (
        name,
        accuracy,
        spread([run.last.merged for run in runs], scale=100),
        f"{statistics.fmean(run.last.down_bytes for run in runs) * _MB:.3f}",
        f"{statistics.fmean(run.last.up_bytes for run in runs) * _MB:.3f}",
        f"{_mean_bytes(runs) * _MB:.3f}",
        share,
        str(len(runs[0].points)),
    )


def _goals(bar: Bar, rows: Rows) -> list[Goal]:
    """On the seeds that both have."""
    by_seed = {run.seed: run for run in rows[FEDAVG]}
    pairs = [(run, by_seed[run.seed]) for run in rows[bar.method] if run.seed in by_seed]
    if not pairs:
        return []
    differences = [ours.last.accuracy - theirs.last.accuracy for ours, theirs in pairs]
    share = _mean_bytes([theirs for _, theirs in pairs]) / _mean_bytes([ours for ours, _ in pairs])
    return [
        Goal(
            what=f"{bar.method}: accuracy {bar.words}",
            wanted=f"at least {-bar.slack * 100:+.0f} points" if bar.slack else "at least 0 points",
            measured=f"{spread(differences, scale=100)} points",
            met=statistics.fmean(differences) >= -bar.slack,
        ),
        Goal(
            what=f"{bar.method}: bytes",
            wanted=f"at most 1/{bar.parts} of FedAvg's",
            measured=f"1/{share:.1f}",
            met=share >= bar.parts,
        ),
    ]


def _mean_bytes(runs: Sequence[AccuracyRun]) -> float:
    return statistics.fmean(run.last.total_bytes for run in runs)
