"""The section of RESULTS.md, from the benchmark's JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reft_edge.simulation.results.markdown import Goal, goals, table
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.simulation.step.records import CONVOLUTIONAL, StepRun, StepSettings

TIME_GOAL, MEMORY_GOAL = 1.0, 0.5


def section(path: Path) -> str:
    """Markdown: what was run, a row for each model and number of threads, the goals."""
    results = ResultsFile.read(path, StepSettings, StepRun)
    runs, settings = results.runs, results.settings
    if not runs:
        return "## Training step\n\nNothing was run.\n"
    waiting = "spin" if settings.spin else "sleep"
    introduction = (
        f"One training step (forward, loss, backward, SGD with momentum) of {settings.batch_size} samples in the "
        f"agent's trainer and in torch eager, each in a process of its own, by turns of about {settings.turn_s:g} s; "
        f"{settings.turns} turns each. *time* is the median over the turns of onnxruntime's time over torch's, *CPU* "
        "the same in processor time, *memory* the ratio of the processes' largest resident memory. onnxruntime's idle "
        f"threads {waiting}. *of peak*: FLOP/s of the step's matrix products over the whole step's time, against large "
        "float32 products on as many threads (the better of onnxruntime's and numpy's).\n"
    )
    return "\n".join(
        ["## Training step: onnxruntime against torch eager\n", introduction, _table(runs), goals(_goals(runs))]
    )


def _table(runs: Sequence[StepRun]) -> str:
    header = (
        "model, threads",
        "parameters",
        "MMACs",
        "graph, kB",
        "ms",
        "torch, ms",
        "time",
        "CPU",
        "MiB",
        "memory",
        "of peak",
    )
    rows = [
        (
            f"{run.model}, {run.threads}",
            f"{run.parameters:,}",
            f"{run.forward_macs / 1e6:.1f}",
            f"{run.graph_bytes / 1e3:.1f}",
            f"{1e3 * run.ours_s:.1f}",
            f"{1e3 * run.theirs_s:.1f}",
            f"{run.time_ratio:.2f}",
            f"{run.cpu_ratio:.2f}",
            f"{run.ours_peak_bytes / 2**20:.0f}",
            f"{run.memory_ratio:.2f}",
            f"{run.peak_share:.0%}",
        )
        for run in runs
    ]
    return table(header, rows)


def _goals(runs: Sequence[StepRun]) -> list[Goal]:
    found = [
        Goal(
            what=f"time of {run.model}, {_threads(run.threads)}",
            wanted=f"at most {TIME_GOAL:.1f}x torch's",
            measured=f"{run.time_ratio:.2f}x",
            met=run.time_ratio <= TIME_GOAL,
        )
        for run in runs
        if run.model in CONVOLUTIONAL
    ]
    largest = max(runs, key=lambda run: run.memory_ratio)
    found.append(
        Goal(
            what=f"memory, all models; most: {largest.model}, {_threads(largest.threads)}",
            wanted=f"at most {MEMORY_GOAL:.1f}x torch's",
            measured=f"{largest.memory_ratio:.2f}x",
            met=largest.memory_ratio <= MEMORY_GOAL,
        )
    )
    return found


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
