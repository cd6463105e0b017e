"""A shorter cut of `scripts/benchmarks/faults`: each kind of process is killed once in a federation of real ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from reft_edge.simulation.faults.campaign import UNDISTURBED, summarize
from reft_edge.simulation.faults.drawing import draw
from reft_edge.simulation.faults.play import play
from reft_edge.simulation.faults.site import SiteOptions
from reft_edge.simulation.faults.words import COORDINATOR, KINDS, LASTING, Fault, Figures, Kind, Moment, Outcome, Script

OPTIONS = SiteOptions(rounds=2, seconds_a_training=0.6)
NORTH, EAST, SOUTH = OPTIONS.devices


def fault(kind: Kind, who: str, what: str, number: int, *, device: str = "", pause_s: float = 0.5) -> Fault:
    moment = Moment(who=who, what=what, round=number)
    return Fault(kind=kind, moment=moment, device=device, pause_s=pause_s)


def played(directory: Path, *faults: Fault, options: SiteOptions = OPTIONS, quorum: float = 1.0) -> Outcome:
    outcome = play(Script(seed=0, quorum=quorum, faults=faults), directory / "run", options)
    assert outcome.complaints == ()
    assert outcome.missed == ()
    assert (outcome.figures.lost, outcome.figures.twice) == (0, 0)
    assert not (directory / "run").exists()
    return outcome


@pytest.mark.slow
@pytest.mark.mosquitto
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("mosquitto_program")
def test_who_is_killed_comes_back_and_the_result_is_the_same(tmp_path: Path) -> None:
    processes = played(
        tmp_path,
        fault("kill-agent", NORTH, "training", 1, device=NORTH),
        fault("kill-coordinator", COORDINATOR, "update 2", 1),
        fault("kill-agent", EAST, "uploading", 2, device=EAST),
        options=msgspec.structs.replace(OPTIONS, signed=True),
    )
    broker = played(
        tmp_path, fault("kill-broker", SOUTH, "training", 1), fault("kill-broker", COORDINATOR, "round_merged", 2)
    )
    assert processes.history == broker.history
    assert processes.weights == broker.weights
    assert processes.figures.counted == broker.figures.counted == 2 * len(OPTIONS.devices)


@pytest.mark.slow
@pytest.mark.mosquitto
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("mosquitto_program")
def test_a_killed_worker_costs_its_task_and_nothing_else(tmp_path: Path) -> None:
    outcome = played(tmp_path, fault("kill-worker", NORTH, "training", 1, device=NORTH), quorum=0.6)
    assert outcome.figures.counted == 2 * len(OPTIONS.devices) - 1
    assert f"1.1 {NORTH} x0 failed" in outcome.history


def test_a_seed_always_means_the_same_and_all_kinds_of_faults_are_drawn() -> None:
    scripts = [draw(seed, devices=OPTIONS.devices, rounds=3, kinds=KINDS) for seed in range(200)]
    assert scripts == [draw(seed, devices=OPTIONS.devices, rounds=3, kinds=KINDS) for seed in range(200)]
    assert {item.kind for script in scripts for item in script.faults} == set(KINDS)
    for script in scripts:
        assert 1 <= len(script.faults) <= 3
        assert sum(item.kind in LASTING for item in script.faults) <= 1


def test_a_summary_finds_runs_of_one_history_with_two_results() -> None:
    def outcome(seed: int, weights: str) -> Outcome:
        return Outcome(
            seed=seed,
            script=Script(seed=seed, quorum=1.0, faults=()),
            seconds=1.0,
            injected=(),
            missed=(),
            complaints=(),
            figures=Figures(finished=1, counted=1),
            history=("1.1 north x0 merged",),
            weights=weights,
        )

    same = summarize([outcome(UNDISTURBED, "a"), outcome(0, "a"), outcome(1, "a")])
    assert (same.well, same.equal, same.complete) == (True, 2, 2)
    other = summarize([outcome(UNDISTURBED, "a"), outcome(0, "a"), outcome(1, "b")])
    assert (other.well, other.equal, len(other.unlike)) == (False, 1, 1)
