"""RESULTS.md: the same files give the same text, and nothing in it is from elsewhere."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from reft_edge.errors import ConfigError
from reft_edge.simulation.results.report import CHAPTERS, HEAD, Chapter, report
from reft_edge.simulation.results.results_file import ResultsFile, results_path

ROOT = Path(__file__).resolve().parents[2]

TOYS = (Chapter(name="toy", module="toy_section"), Chapter(name="other", module="toy_section", options="--data FOLDER"))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    rounds: int


class Run(msgspec.Struct, frozen=True, kw_only=True):
    accuracy: float


@pytest.fixture(autouse=True)
def _section(monkeypatch):
    def section(path):
        results = ResultsFile.read(path, Settings, Run)
        return f"## {results.benchmark.title()}\n\n{[run.accuracy for run in results.runs]}"

    monkeypatch.setitem(sys.modules, "toy_section", SimpleNamespace(section=section))


@pytest.fixture
def measured(tmp_path):
    """Keep a run of a toy benchmark."""

    def measured(name, *, quick=False, accuracy=0.125):
        path = results_path(tmp_path / "results", name, quick=quick)
        results = ResultsFile.open(path, benchmark=name, settings=Settings(rounds=3), run_type=Run)
        results.add(Run(accuracy=accuracy))
        return path

    return measured


def write(tmp_path):
    return report(tmp_path, root=tmp_path, chapters=TOYS)


def test_any_subset_of_tables_is_shown_in_order_and_none_is_no_error(tmp_path, measured):
    assert write(tmp_path) == HEAD
    measured("other", quick=True)
    text = write(tmp_path)
    assert re.findall("^## .*", text, re.MULTILINE) == ["## Other"]
    assert "`scripts/benchmarks/other --data FOLDER --quick`" in text
    measured("toy")
    measured("other")
    text = write(tmp_path)
    assert re.findall("^## .*", text, re.MULTILINE) == ["## Toy", "## Other"]
    assert "--quick" not in text, "measured in full"


def test_plots_and_notes_stand_under_their_table(tmp_path, measured):
    measured("toy").with_suffix(".svg").write_text("<svg/>")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "toy.md").write_text("### What helped\n\nNothing.\n")
    text = write(tmp_path)
    assert text.index("[0.125]") < text.index("![toy](results/toy.svg)") < text.index("### What helped")


def test_the_same_files_give_the_same_text_and_every_number_is_from_them(tmp_path, measured):
    path = measured("toy")
    text = write(tmp_path)
    assert write(tmp_path) == text
    document = json.loads(path.read_text())
    origin = document["provenance"][0]
    gibibytes = f"{origin['memory_bytes'] / 2**30:.0f}"
    given = [*map(str, document["runs"][0].values()), *map(str, origin["packages"].values()), gibibytes, "M1"]
    given += [origin[key] for key in ("processor", "system", "python", "commit")]
    given += [origin["date"][:10], f"{origin['cores']:g} cores"]
    rest = text.removeprefix(HEAD)
    for one in sorted(filter(None, given), key=len, reverse=True):
        assert one in rest
        rest = rest.replace(one, "")
    assert not re.findall(r"\d", rest)


def test_a_file_of_something_else_is_one_line(tmp_path, measured):
    measured("toy").write_text("{}")
    with pytest.raises(ConfigError, match=r"toy\.json is no file of benchmark results"):
        write(tmp_path)


def test_results_in_the_repository_are_what_report_writes():
    text = report(ROOT / "scripts" / "benchmarks", root=ROOT, chapters=CHAPTERS)
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == text, "run scripts/benchmarks/report"
