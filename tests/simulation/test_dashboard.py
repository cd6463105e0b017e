"""The dashboard's benchmark: its fleet is what a coordinator would have written, and its text is from its figures."""

from __future__ import annotations

import msgspec

from reft_edge.coordinator.overview import overview
from reft_edge.coordinator.report.record import gather
from reft_edge.coordinator.run_files import find_run
from reft_edge.simulation.dashboard.fleet import names, write_fleet
from reft_edge.simulation.dashboard.records import BENCHMARK, DashboardRun, DashboardSettings, PageLoad
from reft_edge.simulation.dashboard.section import section
from reft_edge.simulation.dashboard.trial import PAGES, missing
from reft_edge.simulation.results.results_file import ResultsFile


def test_the_written_fleet_is_a_run_with_an_open_round(tmp_path):
    files = find_run(write_fleet(tmp_path, 6, 2))
    events = files.events()
    found = overview(events, files)
    assert (found.round, found.rounds, len(found.values)) == (3, 3, 2)
    assert [one.device for one in found.devices] == names(6)
    assert {one.state for one in found.devices} == {"training"}
    assert {one.capacity.used_flops_per_s for one in found.devices} == {1.25e9}
    assert [one.updates for one in gather(events).rounds] == [6, 6]


def run(page, **more):
    load = PageLoad(first_paint_ms=321.0, complete_ms=432.0, transferred_bytes=345_600, requests=14)
    slow = msgspec.structs.replace(load, first_paint_ms=999.0)
    one = DashboardRun(page=page, cold=(load, slow, load), warm=(load,), quiet_cpu=0.011, busy_cpu=0.077)
    return msgspec.structs.replace(one, **more)


def test_the_text_is_made_of_the_file_and_says_which_goals_were_missed(tmp_path):
    path = tmp_path / "dashboard.json"
    results = ResultsFile.open(path, benchmark=BENCHMARK, settings=DashboardSettings(), run_type=DashboardRun)
    results.add(run("fleet"))
    assert missing(results.runs) == [page for page in PAGES if page != "fleet"]
    results.add(run("round", update_ms=(100.0,) * 99 + (900.0,), update_busy_ms=(700.0,) * 20))
    text = section(path)
    assert text.startswith("## Dashboard with 200 devices\n")
    assert "| fleet | 321 ms | 432 ms | 346 | 14 | 321 ms | 432 ms | 1.1% | 7.7% | 0.0% | 0 |" in text
    assert "95th percentile of 100 | at most 500 ms | 100 ms (median 100 ms) | met |" in text
    assert "95th percentile of 20 | at most 500 ms | 700 ms (median 700 ms) | **missed** |" in text
