"""Properties of what all benchmarks share: files of runs, tables, plots."""

from __future__ import annotations

import json

import msgspec
import pytest

from reft_edge.errors import ConfigError
from reft_edge.simulation.results.figures import SERIES, drawing
from reft_edge.simulation.results.markdown import Goal, goals, spread, table
from reft_edge.simulation.results.provenance import provenance
from reft_edge.simulation.results.results_file import ResultsFile, read_provenance, results_path


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    rounds: int = 3
    models: tuple[str, ...] = ("mlp",)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    accuracy: float
    by_round: tuple[float, ...] = ()


def opened(path, settings=None):
    return ResultsFile.open(path, benchmark="toy", settings=settings or Settings(), run_type=Run)


def test_runs_are_there_when_the_file_is_opened_again(tmp_path):
    path = tmp_path / "deep" / "toy.json"
    first = opened(path)
    first.add(Run(seed=0, accuracy=0.5))
    first.add(Run(seed=1, accuracy=0.1, by_round=(0.05, 0.1)))
    again = opened(path)
    assert again.runs == [Run(seed=0, accuracy=0.5), Run(seed=1, accuracy=0.1, by_round=(0.05, 0.1))]
    again.add(Run(seed=2, accuracy=0.25))
    read = ResultsFile.read(path, Settings, Run)
    assert read.runs == again.runs
    assert read.settings == Settings()
    assert not path.with_name("toy.json.tmp").exists()


def test_a_file_of_other_settings_is_refused_and_the_first_that_differs_is_named(tmp_path):
    opened(tmp_path / "toy.json").add(Run(seed=0, accuracy=0.5))
    with pytest.raises(ConfigError, match=r"toy\.json holds runs with models = \['mlp'\], not \['vgg16'\]"):
        opened(tmp_path / "toy.json", Settings(models=("vgg16",)))
    with pytest.raises(ConfigError, match="benchmark 'toy'"):
        ResultsFile.open(tmp_path / "toy.json", benchmark="other", settings=Settings(), run_type=Run)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"benchmark": "toy"}'])
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    (tmp_path / "toy.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"toy\.json is no file of benchmark results"):
        opened(tmp_path / "toy.json")


def test_runs_of_another_version_are_refused(tmp_path):
    opened(tmp_path / "toy.json").add(Run(seed=0, accuracy=0.5))
    document = json.loads((tmp_path / "toy.json").read_bytes())
    del document["runs"][0]["accuracy"]
    (tmp_path / "toy.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="another version"):
        opened(tmp_path / "toy.json")


def test_a_run_that_json_cannot_hold_leaves_the_file_as_it_was(tmp_path):
    results = opened(tmp_path / "toy.json")
    results.add(Run(seed=0, accuracy=0.5))
    before = (tmp_path / "toy.json").read_bytes()
    with pytest.raises(ValueError, match="no number"):
        results.add(Run(seed=1, accuracy=float("nan")))
    assert (tmp_path / "toy.json").read_bytes() == before
    assert len(results.runs) == 1


def test_a_file_says_where_its_runs_were_made_once_for_each_machine(tmp_path):
    path = results_path(tmp_path, "toy", quick=True)
    assert path.name == "toy-quick.json"
    results = opened(path)
    results.add(Run(seed=0, accuracy=0.5))
    results.add(Run(seed=1, accuracy=0.5))
    here = provenance()
    (there,) = read_provenance(path)
    assert (there.processor, there.python, there.packages) == (here.processor, here.python, here.packages)
    assert "numpy" in there.packages
    again = opened(path)
    again.provenance = (msgspec.structs.replace(there, processor="another"),)
    again.add(Run(seed=2, accuracy=0.5))
    assert [one.processor for one in read_provenance(path)] == ["another", here.processor]


def test_a_table_holds_its_cells_whatever_is_in_them():
    text = table(("model", "a|b"), [("vgg16", "1")])
    assert text.splitlines() == ["| model | a\\|b |", "|---|---:|", "| vgg16 | 1 |"]
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        table(("model", "MB"), [("vgg16",)])


def test_goals_say_met_or_missed():
    text = goals(
        [
            Goal(what="size", wanted="1.8 MB", measured="1.7 MB", met=True),
            Goal(what="time", wanted="1.0x", measured="1.2x", met=False),
            Goal(what="accuracy", wanted="97", measured="", met=None),
        ]
    )
    assert [line.split("|")[-2].strip() for line in text.splitlines()[2:]] == ["met", "**missed**", "not measured"]


def test_spread_is_the_mean_and_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert spread([0.9712], scale=100) == "97.1"
    assert spread([0.5, 0.7], digits=2) == "0.60 ± 0.14"


def test_the_same_plot_gives_the_same_bytes_and_a_failed_one_none(tmp_path):
    for name in ("one.svg", "two.svg"):
        with drawing(tmp_path / name, columns=2) as (left, right):
            left.plot([1, 2], [3, 4], label="a", **SERIES[0].line)
            right.bar(["x"], [1], **SERIES[1].bars)
            right.scatter([0], [1], **SERIES[2].points)
            left.legend()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    with pytest.raises(KeyError), drawing(tmp_path / "three.svg"):
        raise KeyError
    assert not (tmp_path / "three.svg").exists()


def test_series_can_be_told_apart_without_colours():
    assert len({series.marker for series in SERIES}) == len(SERIES)
    assert len({series.hatch for series in SERIES}) == len(SERIES)
    assert len({str(series.dash) for series in SERIES}) == len(SERIES)
