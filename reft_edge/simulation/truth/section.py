"""The section of RESULTS.md, and the plot beside it, from the benchmark's JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from reft_edge.simulation.results.markdown import Goal, goals, table
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.simulation.truth.records import RoundTruth, TruthRun, TruthSettings

FIRST_GOAL, CORRECTED_GOAL, MEMORY_GOAL = 0.20, 0.10, 0.15

Truth = ResultsFile[TruthSettings, TruthRun]


def section(path: Path) -> str:
    """Markdown: what was run, the errors by device and by model, the goals."""
    file = ResultsFile.read(path, TruthSettings, TruthRun)
    runs = _runs(file)
    if not runs:
        return "## Planner's truth\n\nNothing could be run.\n"
    parts = [_introduction(file, runs), _by("device", runs, lambda run: run.case.device)]
    parts += [_by("model", runs, lambda run: run.case.model), goals(_goals(runs)), _start(runs)]
    if skipped := [run for run in file.runs if run.skipped]:
        reasons = "; ".join(
            f"{run.case.device}, {run.case.model} at {run.case.ratio:g}: {run.skipped}" for run in skipped
        )
        parts.append(f"Left out: {reasons}.\n")
    return "\n".join(parts)


def draw(path: Path, picture: Path) -> None:
    """Predicted against measured, with the goals as bands: time of the first round, time corrected, memory."""
    from reft_edge.simulation.results.figures import SERIES, drawing

    file = ResultsFile.read(path, TruthSettings, TruthRun)
    runs = _runs(file)
    if not runs:
        return
    panels: Sequence[tuple[str, Callable[[TruthRun], tuple[float, float]], float, float]] = (
        ("s a step, first round", lambda run: _step(run, run.rounds[0]), -FIRST_GOAL, FIRST_GOAL),
        ("s a step, corrected once", lambda run: _step(run, run.rounds[1]), -CORRECTED_GOAL, CORRECTED_GOAL),
        ("MiB at the peak, first round", lambda run: _peak(run.rounds[0]), 0.0, MEMORY_GOAL),
    )
    with drawing(picture, columns=len(panels), width=4.0, height=4.2) as all_axes:
        for axes, (title, values, low, high) in zip(all_axes, panels, strict=True):
            ends = [end for run in runs for end in values(run)]
            line = [min(ends) / 1.3, max(ends) * 1.3]
            axes.fill_between(line, [x * (1 + low) for x in line], [x * (1 + high) for x in line], color="0.88")
            axes.plot(line, line, color="0.4", linewidth=1)
            for device, series in zip(_names(runs, lambda run: run.case.device), SERIES, strict=False):
                points = [values(run) for run in runs if run.case.device == device]
                axes.scatter([m for m, _ in points], [p for _, p in points], s=18, label=device, **series.points)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("measured")
            axes.set_ylabel("predicted")
        all_axes[0].legend()


def _runs(file: Truth) -> list[TruthRun]:
    return [run for run in file.runs if len(run.rounds) > 1]


def _introduction(file: Truth, runs: Sequence[TruthRun]) -> str:
    settings = file.settings
    models = _names(runs, lambda run: run.case.model)
    variants = {(run.case.model, run.case.ratio) for run in runs}
    others = statistics.median(found.others_share for run in runs for found in run.rounds)
    return (
        f"## Planner's truth\n\n{len(variants)} variants of {len(models)} models ({', '.join(models)}; pruned by "
        f"{', '.join(f'{ratio:g}' for ratio in settings.ratios)}), each on "
        f"{len(_names(runs, lambda run: run.case.device))} "
        f"emulated devices: this machine with so many threads, bound to half a core by the kernel, or paced to a share "
        f"of what it measured. Each device measures itself right before (`profile-device --quick`), then the planner "
        f"predicts, the product's worker trains with batches of {settings.batch_size} for about "
        f"{settings.training_s:g} s, the planner corrects itself, and so on for {settings.rounds} rounds. Errors are "
        f"of the prediction against what was measured, median and (largest); memory is the worker's peak. Others took "
        f"{others:.0%} of the processor meanwhile (median). The last column: what one FLOP/s for all models would have "
        f"predicted.\n"
    )


def _by(what: str, runs: Sequence[TruthRun], key: Callable[[TruthRun], str]) -> str:
    rows = []
    for name in [*_names(runs, key), "all"]:
        chosen = [run for run in runs if name in (key(run), "all")]
        rows.append(
            (
                name,
                str(len(chosen)),
                _typical([_first(run) for run in chosen]),
                _typical([_corrected(run) for run in chosen]),
                _typical([_memory(run) for run in chosen]),
                f"{min(_memory(run) for run in chosen):+.0%}",
                _typical([_single_figure(run) for run in chosen]),
            )
        )
    header = (what, "cases", "time, first", "time, corrected", "memory", "lowest memory", "one FLOP/s")
    return table(header, rows)


def _goals(runs: Sequence[TruthRun]) -> list[Goal]:
    return [
        _goal("training time, first round", FIRST_GOAL, [_first(run) for run in runs]),
        _goal("training time, corrected once", CORRECTED_GOAL, [_corrected(run) for run in runs]),
        _goal("peak memory, first round", MEMORY_GOAL, [_memory(run) for run in runs]),
        Goal(
            what="peak memory, never under, all rounds",
            wanted="none",
            measured=str(sum(_memory_of(found) < 0 for run in runs for found in run.rounds)),
            met=all(_memory_of(found) >= 0 for run in runs for found in run.rounds),
        ),
    ]


def _goal(what: str, wanted: float, errors: Sequence[float]) -> Goal:
    within = sum(abs(error) <= wanted for error in errors)
    return Goal(
        what=what,
        wanted=f"within {wanted:.0%}",
        measured=f"{within} of {len(errors)}, median {statistics.median(map(abs, errors)):.0%}",
        met=within == len(errors),
    )


def _start(runs: Sequence[TruthRun]) -> str:
    first = [run.rounds[0].predicted_start_s - run.rounds[0].measured_start_s for run in runs]
    seen = max(abs(found.seen_peak_bytes / found.measured_peak_bytes - 1) for run in runs for found in run.rounds)
    return (
        f"A cold start (process, data, session, first evaluation) was predicted within {max(map(abs, first)):.1f} s, "
        f"median {statistics.median(map(abs, first)):.2f} s. The peak that a device reports and the largest that was "
        f"seen from outside differ by at most {seen:.0%}.\n"
    )


def _first(run: TruthRun) -> float:
    return _time(run.rounds[0])


def _corrected(run: TruthRun) -> float:
    return _time(run.rounds[1])


def _memory(run: TruthRun) -> float:
    return _memory_of(run.rounds[0])


def _single_figure(run: TruthRun) -> float:
    return run.single_figure_s / run.rounds[0].measured_training_s - 1


def _time(found: RoundTruth) -> float:
    return found.predicted_training_s / found.measured_training_s - 1


def _memory_of(found: RoundTruth) -> float:
    return found.predicted_peak_bytes / found.measured_peak_bytes - 1


def _step(run: TruthRun, found: RoundTruth) -> tuple[float, float]:
    """Measured and predicted, for one step."""
    return found.measured_training_s / run.steps, found.predicted_training_s / run.steps


def _peak(found: RoundTruth) -> tuple[float, float]:
    return found.measured_peak_bytes / 2**20, found.predicted_peak_bytes / 2**20


def _typical(errors: Sequence[float]) -> str:
    """The median size of an error, and the largest with its sign."""
    return f"{statistics.median(map(abs, errors)):.0%} ({max(errors, key=abs):+.0%})"


def _names(runs: Sequence[TruthRun], key: Callable[[TruthRun], str]) -> list[str]:
    return list(dict.fromkeys(key(run) for run in runs))
