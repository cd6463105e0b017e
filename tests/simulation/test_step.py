from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from reft_edge.errors import ResourceError
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.simulation.step.comparison import Side, compare
from reft_edge.simulation.step.records import BENCHMARK, StepRun, StepSettings
from reft_edge.simulation.step.section import section

RUN = StepRun(
    model="vgg_small",
    threads=2,
    parameters=295_770,
    forward_macs=13_419_776,
    graph_bytes=7_000,
    step_flops=2_577_000_000,
    ours_s=0.046,
    theirs_s=0.048,
    time_ratio=0.96,
    cpu_ratio=0.9,
    ours_peak_bytes=100 * 2**20,
    theirs_peak_bytes=360 * 2**20,
    gemm_flops_per_s=1e11,
    blas_flops_per_s=9e10,
    peak_share=0.56,
)


def test_both_sides_train_and_are_compared_turn_by_turn() -> None:
    run = compare("mlp", 1, StepSettings(turns=2, turn_s=0.01))
    assert (run.model, run.threads) == ("mlp", 1)
    assert min(run.ours_s, run.theirs_s, run.time_ratio, run.cpu_ratio, run.peak_share) > 0
    assert run.ours_peak_bytes < run.theirs_peak_bytes  # one of the two has no torch


def test_a_side_that_dies_is_named() -> None:
    with Side("torch", "no-such-model", "4", "1") as side, pytest.raises(ResourceError, match="torch no-such-model"):
        side.run(1)


def test_the_section_says_which_goals_are_met(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    results = ResultsFile.open(path, benchmark=BENCHMARK, settings=StepSettings(), run_type=StepRun)
    results.add(RUN)
    results.add(msgspec.structs.replace(RUN, threads=1, time_ratio=1.2, theirs_peak_bytes=150 * 2**20))
    results.add(msgspec.structs.replace(RUN, model="vit_small", time_ratio=3.0))
    rows = {line.split("|")[1].strip(): line for line in section(path).splitlines() if line.startswith("|")}
    assert "0.96x | met" in rows["time of vgg_small, 2 threads"]
    assert "1.20x | **missed**" in rows["time of vgg_small, 1 thread"]
    assert "0.67x | **missed**" in rows["memory, all models; most: vgg_small, 1 thread"]
    assert not [row for row in rows if "time of vit_small" in row]  # the goal is for convolutional models
    assert "56%" in rows["vgg_small, 2"]
