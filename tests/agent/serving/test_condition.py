"""How often a device tells how it is: at once when it matters, and hardly ever otherwise."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import numpy as np

from reft_edge.agent.serving.condition import ConditionReport
from reft_edge.agent.serving.counts import CountsWriter
from reft_edge.agent.serving.prediction import Prediction
from reft_edge.agent.serving.slots import COUNTS, Slots
from reft_edge.agent.settings import ServingSettings
from reft_edge.wire.deployment import Attempt, Condition, PredictionCounts, Vitals
from tests.agent.serving.test_slots import serve

FETCHING = Attempt(deployment="roll-out-two", state="fetching")


class Bench:
    """A report with a clock, a board and slots of the test's."""

    def __init__(self, directory: Path, *, report: bool = False) -> None:
        self.slots = Slots(directory / "serving")
        self.board = Vitals(temperature_celsius=50.0, throttled=False)
        self.said: list[Condition] = []
        self.report = ConditionReport(
            self.slots,
            ServingSettings(report=report, report_every_s=60),
            counts_folder=self.slots.root / COUNTS,
            say=self.said.append,
            read_board=lambda: self.board,
        )

    def new(self) -> list[Condition]:
        """What was said since this was called last."""
        said, self.said[:] = list(self.said), []
        return said


def test_what_is_served_is_said_at_once_and_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.report.update(None, now=0)
    assert (bench.new(), bench.report.look_at) == ([], None)  # there is nobody to tell
    bench.report.connected(None, now=1)
    assert bench.new() == [Condition(vitals=bench.board)]
    serve(bench.slots, "one")
    bench.report.update(None, now=2)
    (told,) = bench.new()
    assert told.serving is not None
    assert (told.serving.version, told.serving.model, told.previous) == ("version-one", "global", None)
    bench.report.update(FETCHING, now=3)
    bench.report.update(FETCHING, now=4)
    (told,) = bench.new()
    assert told.attempt == FETCHING
    bench.report.update(FETCHING, now=5, again=True)
    assert bench.new() == [told]
    serve(bench.slots, "two")
    bench.report.update(FETCHING, now=6)
    (after,) = bench.new()
    assert after.previous == told.serving


def test_a_new_connection_is_told_everything(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for now in (1, 2):
        bench.report.connected(FETCHING, now=now)
        assert bench.new() == [Condition(attempt=FETCHING, vitals=bench.board)]
        bench.report.disconnected()
        bench.report.update(None, now=now)
        bench.report.tick(None, now=now + 100)
        assert bench.new() == []


def test_a_device_that_idles_says_nothing_and_a_warm_one_little(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.report.connected(None, now=0)
    bench.new()
    now = 0.0
    for wobble in np.random.default_rng(1).uniform(-1, 1, 200):
        bench.board = Vitals(temperature_celsius=50 + wobble, throttled=False)
        assert bench.report.look_at == now + 60
        bench.report.tick(None, now + 59)
        now += 60
        bench.report.tick(None, now)
    assert bench.new() == []
    for board in (
        Vitals(temperature_celsius=54.0, throttled=False),
        Vitals(temperature_celsius=54.0, throttled=True),
        Vitals(temperature_celsius=None, throttled=True),
        Vitals(battery_share=0.5, on_battery=True),
        Vitals(battery_share=0.47, on_battery=True),
    ):
        bench.board = board
        bench.report.tick(None, now + 30)
        assert bench.new() == []  # not more often than the owner allows
        now += 60
        bench.report.tick(None, now)
        assert [told.vitals for told in bench.new()] == [board]


def test_counts_are_told_only_where_the_owner_allows_it(tmp_path: Path) -> None:
    silent, open_ = Bench(tmp_path / "silent"), Bench(tmp_path / "open", report=True)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    for bench in (silent, open_):
        serve(bench.slots, "one")
        bench.report.connected(None, now=0)
        assert [told.counts for told in bench.new()] == [None]
        counts = CountsWriter(bench.slots.root / COUNTS, write_every_s=0.01)
        prediction = Prediction(version="version-one", model="m", outputs=probabilities, probabilities=probabilities)
        counts.add("roll-out-one", prediction, duration_s=0.01)
        counts.close()
        bench.report.tick(None, now=60)
    assert silent.new() == []
    (told,) = open_.new()
    assert told.counts is not None
    assert (told.counts.version, told.counts.predictions, told.counts.classes) == ("version-one", 2, (1, 1))
    open_.report.tick(None, now=120)
    assert open_.new() == []
    serve(open_.slots, "two")
    open_.report.update(None, now=121)
    assert [told.counts for told in open_.new()] == [None]  # of another version nothing is counted yet


def failed(bench: Bench, deployment: str, n_errors: int = 1) -> None:
    counts = CountsWriter(bench.slots.root / COUNTS, errors_only=True)
    for _ in range(n_errors):
        counts.add_error(deployment)
    counts.close()


def look(bench: Bench, until: float) -> list[float]:
    """Call `tick` when it is due; when that was."""
    at = []
    while (due := bench.report.look_at) is not None and due <= until:
        at.append(due)
        bench.report.tick(None, due)
    return at


def test_errors_after_a_switch_are_told_at_once_whatever_the_owner_allows(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.report.connected(None, now=0)
    for name, switched_at in (("one", 1000.0), ("two", 2000.0)):
        look(bench, switched_at)
        serve(bench.slots, name)
        bench.report.update(None, switched_at)
        bench.new()
        failed(bench, f"roll-out-{name}")
        look(bench, switched_at + 1.5)
        (told,) = bench.new()
        assert told.counts == PredictionCounts(version=f"version-{name}", errors=1)
        look(bench, switched_at + 100)
        assert bench.new() == []  # known already
        failed(bench, f"roll-out-{name}", n_errors=2)
        look(bench, switched_at + 120)
        assert [told.counts and told.counts.errors for told in bench.new()] == [3]


def test_the_longer_a_version_serves_the_less_often_it_is_looked_at(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    serve(bench.slots, "one")
    bench.report.connected(None, now=0)
    bench.new()
    at = look(bench, 2000)
    pauses = [after - before for before, after in itertools.pairwise([0.0, *at])]
    assert all(pause <= max(1, after / 10) for pause, after in zip(pauses, at, strict=True))
    assert pauses[:10] == [1] * 10  # `WATCH_AT_LEAST_S`
    assert pauses[-10:] == [60] * 10  # `report_every_s`
    assert len(at) < 100
    assert bench.new() == []  # and nothing is said


def test_a_condition_is_small(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    serve(bench.slots, "one", "two")
    bench.report.connected(FETCHING, now=0)
    assert len(msgspec.json.encode(bench.new()[0])) < 1000
