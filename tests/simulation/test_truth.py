"""The planner benchmark's parts: a real worker seen from outside, a quota that binds, and what the section says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from reft_edge.agent.reference_step import NARROW_FOLDER, reference_bundle
from reft_edge.errors import ResourceError
from reft_edge.profiling.cgroups import cpu_quota
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.simulation.truth.device import EmulatedDevice
from reft_edge.simulation.truth.quota import Quota
from reft_edge.simulation.truth.records import Case, Emulation, RoundTruth, TruthRun, TruthSettings
from reft_edge.simulation.truth.section import draw, section
from reft_edge.simulation.truth.trial import cases
from reft_edge.wire.codec_names import Float16
from reft_edge.wire.messages import TrainingPlan

MIB = 2.0**20


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_peak_that_a_device_reports_is_the_one_that_is_seen(tmp_path: Path) -> None:
    bundle = reference_bundle(NARROW_FOLDER)
    device = EmulatedDevice(tmp_path, Emulation(name="d"))
    try:
        data = device.take_samples(bundle.manifest, 64, seed=0)
        plan = TrainingPlan(local_epochs=20, batch_size=32, learning_rate=1e-4, seed=0)
        rounds = [device.train(bundle, plan, weights_codec=Float16(), task=f"t{number}") for number in range(2)]
    finally:
        device.close()
    assert data.training_samples + data.holdout_samples == 64
    for trained in rounds:
        assert trained.measured.steps == 20 * -(-data.training_samples // 32)
        assert trained.outside.peak_bytes == pytest.approx(trained.measured.peak_memory_bytes, rel=0.1)
        assert trained.outside.cpu_s > 0
    assert rounds[1].measured.start_s < rounds[0].measured.start_s, "the second round finds a warm worker"


def test_what_is_started_within_a_quota_is_bound_by_it_and_we_are_not() -> None:
    before = cpu_quota()
    try:
        quota = Quota(0.25)
    except ResourceError as exc:
        pytest.skip(str(exc))
    tell = "from reft_edge.profiling.cgroups import cpu_quota; print(cpu_quota())"
    try:
        with quota.joined():
            child = subprocess.Popen([sys.executable, "-c", tell], stdout=subprocess.PIPE, text=True)
        assert child.communicate()[0].strip() == "0.25"
        assert cpu_quota() == before
    finally:
        quota.close()


def truth(*, time_error: float, corrected: float, memory: float) -> TruthRun:
    def one(error: float) -> RoundTruth:
        return RoundTruth(
            predicted_training_s=2.0 * (1 + error),
            measured_training_s=2.0,
            predicted_start_s=0.5,
            measured_start_s=0.4,
            predicted_peak_bytes=100 * MIB * (1 + memory),
            measured_peak_bytes=100 * MIB,
            seen_peak_bytes=99 * MIB,
            cpu_s=2.0,
            others_share=0.0,
        )

    return TruthRun(
        case=Case(device="1 thread", model="mlp", ratio=0.0),
        parameters=1000,
        epochs=3,
        steps=30,
        training_flops_per_s=1e9,
        single_figure_s=0.2,
        rounds=(one(time_error), one(corrected)),
    )


@pytest.mark.parametrize(
    ("run", "missed"),
    [
        (truth(time_error=0.1, corrected=-0.05, memory=0.1), 0),
        (truth(time_error=-0.3, corrected=-0.05, memory=0.1), 1),
        (truth(time_error=0.1, corrected=0.2, memory=0.3), 2),
        (truth(time_error=0.1, corrected=0.0, memory=-0.01), 1),
    ],
)
def test_goals_are_met_or_missed_by_their_numbers(tmp_path: Path, run: TruthRun, missed: int) -> None:
    path = tmp_path / "planner.json"
    file = ResultsFile.open(path, benchmark="planner", settings=TruthSettings(), run_type=TruthRun)
    file.add(run)
    skipped = msgspec.structs.replace(
        run, case=Case(device="half a core", model="mlp", ratio=0.5), rounds=(), skipped="no group"
    )
    file.add(skipped)
    text = section(path)
    assert text.count("**missed**") == missed
    assert "no group" in text
    draw(path, tmp_path / "planner.svg")
    assert (tmp_path / "planner.svg").stat().st_size > 1000


def test_every_variant_meets_every_device_once() -> None:
    settings = TruthSettings()
    found = list(cases(settings))
    assert len(found) == len(set(found)) == len(settings.devices) * len(settings.models) * len(settings.ratios)
