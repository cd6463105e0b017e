"""The codecs benchmark: what a way costs is counted where it travels, and a report is made from the file alone."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from reft_edge.coordinator.settings import TrainingSettings
from reft_edge.errors import ConfigError
from reft_edge.simulation.codecs.plot import draw
from reft_edge.simulation.codecs.records import (
    BENCHMARK,
    QUICK,
    WAYS,
    CodecRun,
    CodecSettings,
    Message,
    Way,
)
from reft_edge.simulation.codecs.section import BASELINE, BEFORE, CHOSEN, section
from reft_edge.simulation.codecs.summary import summaries
from reft_edge.simulation.codecs.trial import Ground, run_way
from reft_edge.simulation.results.results_file import ResultsFile
from reft_edge.wire.codec_names import Int4, LayerWise, TopK
from reft_edge.wire.compensation_names import DeepGradientOptions, EControlOptions, EF21Options

SMALL = CodecSettings(model="mlp", ratios=(0.0, 0.5, 0.5), rounds=3, seeds=(0,), one_shot_epochs=8)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(SMALL, seed=0, directory=tmp_path_factory.mktemp("ground"))


def test_every_row_has_a_name_of_its_own_and_the_report_has_the_rows_that_it_needs():
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert {BASELINE, BEFORE, CHOSEN} <= set(QUICK) <= set(WAYS)


@pytest.mark.parametrize(
    "way",
    [
        CHOSEN,
        Way(update=TopK(), compensation=DeepGradientOptions()),
        Way(update=Int4(), compensation=EF21Options()),
        Way(update=LayerWise(), compensation=EControlOptions(), delta=TopK()),
    ],
    ids=lambda way: way.name,
)
def test_a_way_learns_and_every_update_passes_the_coordinators_checks(ground, way):
    run = run_way(ground, way)
    assert run.rejected == 0
    assert len(run.accuracy) == len(run.up_bytes) == len(run.down_bytes) == 3
    assert run.accuracy[-1] > 0.2
    assert run == with_times_of(run, run_way(ground, way))
    if way.delta is not None:
        assert max(run.down_bytes[1:]) < 0.6 * run.down_bytes[0]
    if isinstance(way.compensation, DeepGradientOptions):
        assert all(after < before for before, after in pairwise(run.up_bytes))  # the warm-up


def with_times_of(run, other):
    """`other` with the times of `run`, which are never the same."""
    message = msgspec.structs.replace(other.message, encode_s=run.message.encode_s, decode_s=run.message.decode_s)
    return msgspec.structs.replace(other, message=message)


def test_an_update_takes_fewer_bytes_and_loses_more_the_coarser_its_codec(ground):
    messages = [ground.message(codec) for codec in (BASELINE.update, BEFORE.update, LayerWise(error_budget=0.5))]
    assert all(after.n_bytes < 0.5 * before.n_bytes for before, after in pairwise(messages))
    assert messages[0].one_shot_accuracy > 0.4
    assert messages[1].one_shot_accuracy == pytest.approx(messages[0].one_shot_accuracy, abs=0.03)
    assert messages[0].relative_error == 0 < messages[1].relative_error < 0.02 < messages[2].relative_error <= 0.5


def made_up(way, seed, accuracy, n_bytes):
    message = Message(n_bytes=n_bytes, encode_s=1e-3, decode_s=1e-3, relative_error=0.1, one_shot_accuracy=0.8)
    bytes_by_round = tuple([n_bytes] * len(accuracy))
    return CodecRun(
        way=way, seed=seed, message=message, accuracy=accuracy, up_bytes=bytes_by_round, down_bytes=bytes_by_round,
        rejected=0,
    )  # fmt: skip


def test_bytes_count_until_the_target_is_first_reached():
    runs = [
        made_up(BASELINE, 0, (0.5, 0.91, 0.8, 0.95), 100),
        made_up(BASELINE, 1, (0.5, 0.6, 0.7, 0.8), 100),
    ]
    summary = summaries(runs, target=0.9)[BASELINE]
    assert summary.to_target == (400, None)
    assert summary.total_bytes == 800
    assert summary.accuracy == (pytest.approx((0.91 + 0.8 + 0.95) / 3), pytest.approx(0.7))


def test_the_section_and_the_plot_come_from_the_file_alone(tmp_path):
    path = tmp_path / "codecs.json"
    results = ResultsFile.open(path, benchmark=BENCHMARK, settings=SMALL, run_type=CodecRun)
    for way, accuracy, n_bytes in ((BASELINE, 0.9, 4000), (BEFORE, 0.9, 1000), (CHOSEN, 0.895, 200)):
        results.add(made_up(way, 0, (0.5, accuracy, accuracy, accuracy), n_bytes))
    text = section(path)
    assert text.startswith("## ")
    assert "1/5.0" in text
    assert text.count("| met |") == 3
    assert text == section(path)
    draw(tmp_path / "codecs.svg", SMALL, results.runs)
    assert (tmp_path / "codecs.svg").read_text().count("layer_wise") >= 1


def test_a_section_without_the_rows_of_a_goal_says_so(tmp_path):
    path = tmp_path / "codecs.json"
    results = ResultsFile.open(path, benchmark=BENCHMARK, settings=SMALL, run_type=CodecRun)
    results.add(made_up(BASELINE, 0, (0.5, 0.6, 0.6), 100))
    assert "not measured" in section(path)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        section(tmp_path / "codecs.json")


def test_the_goals_are_those_of_a_federations_defaults():
    defaults = TrainingSettings()
    method = defaults.compensation_method
    assert Way(update=defaults.update_encoding, compensation=method, delta=defaults.delta_encoding) == CHOSEN
