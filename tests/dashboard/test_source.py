"""What the pages show is what lies on disk, however much of it there is and whatever the coordinator does meanwhile."""

from __future__ import annotations

import random
from contextlib import closing

import msgspec
import pytest

from reft_edge.coordinator import events
from reft_edge.coordinator.overview import Capacity, DeviceOverview
from reft_edge.coordinator.records import RunRecord
from reft_edge.coordinator.run_files import find_latest
from reft_edge.coordinator.store import Store
from reft_edge.dashboard import charts, rows
from reft_edge.dashboard.live_table import Changes, differences
from reft_edge.dashboard.source import Source
from reft_edge.simulation.dashboard.fleet import write_fleet
from tests.written_deployment import condition
from tests.written_run import FINISHED, RUN, SETTINGS, tell_on, write_run


def test_before_the_first_run_it_says_what_is_missing(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text(SETTINGS)
    source = Source(path, store_s=0)
    assert source.refresh()
    assert "has no store yet" in source.picture.trouble
    assert not source.refresh(), "nothing has changed"
    write_run(tmp_path)
    assert source.refresh()
    assert source.picture.trouble == ""
    assert source.picture.overview is not None
    assert source.picture.overview.run == RUN


def test_a_picture_changes_with_events_and_with_the_store(tmp_path):
    path = write_run(tmp_path)
    source = Source(path, store_s=0)
    assert source.refresh()
    assert not source.refresh()
    tell_on(path, events.DeviceProgress(round=2, device="pi-1", state="training", steps_done=1, steps_total=4))
    assert source.refresh()
    with closing(Store(tmp_path / "federation", shared=True)) as store:
        store.lift("pi-3", now=2e9)
    assert source.refresh()
    assert source.picture.quarantined == ()
    assert source.picture.version == 3


def test_a_change_while_the_store_is_read_is_seen_the_next_time(tmp_path, monkeypatch):
    source = Source(write_run(tmp_path), store_s=0)
    source.refresh()
    source.refresh()

    def read_and_be_overtaken(settings_file):
        found = find_latest(settings_file)
        with closing(Store(tmp_path / "federation", shared=True)) as store:
            store.lift("pi-3", now=2e9)
        return found

    with closing(Store(tmp_path / "federation", shared=True)) as store:
        store.save_heard(conditions=[condition("d-1", "pi-1")])
    monkeypatch.setattr("reft_edge.dashboard.source.find_latest", read_and_be_overtaken)
    assert source.refresh()
    assert source.picture.quarantined != ()
    monkeypatch.undo()
    assert source.refresh()
    assert source.picture.quarantined == ()


def test_distilling_goes_on_while_devices_come_and_go(tmp_path):
    path = write_run(tmp_path)
    source = Source(path, store_s=0)
    with closing(Store(tmp_path / "federation")):  # a coordinator is at work
        told = events.Distilling(round=2, epoch=3, epochs=9, loss=0.25)
        tell_on(path, told, events.DeviceSeen(device="pi-1", online=False))
        source.refresh()
        assert source.picture.distilling is not None
        assert source.picture.distilling.epoch == 3
        tell_on(path, events.RoundDistilled(round=2, teachers=1, kept_epoch=3, accuracy=0.5))
        source.refresh()
        assert source.picture.distilling is None


def test_a_new_run_takes_the_place_of_the_old_one(tmp_path):
    path = write_run(tmp_path)
    source = Source(path, store_s=0)
    source.refresh()
    with closing(Store(tmp_path / "federation")) as store:
        store.create_run(RunRecord(run="later", federation="birds", settings_digest="", created_at=2e9))
    assert source.refresh()
    assert source.picture.overview is not None
    assert (source.picture.overview.run, source.picture.overview.round) == ("later", 0)


def test_of_what_is_said_again_and_again_only_the_last_word_is_kept(tmp_path):
    path = write_run(tmp_path)
    source = Source(path, store_s=0)
    source.refresh()
    before = len(source.picture.seen)
    training = [
        events.DeviceProgress(round=2, device="pi-1", state="training", steps_done=step, steps_total=500)
        for step in range(500)
    ]
    flapping = [events.DeviceSeen(device="pi-1", online=bool(number % 2)) for number in range(100)]
    waiting = [events.Waiting(devices=1, needed=2) for _ in range(100)]
    distilling = [events.Distilling(round=2, epoch=epoch, epochs=100, loss=1.0) for epoch in range(100)]
    tell_on(path, *training, *flapping, *waiting, *distilling)
    source.refresh()
    assert len(source.picture.seen) == before + 4
    assert source.picture.report.devices[0].profile == "pi-4"
    assert source.picture.overview is not None
    one = next(device for device in source.picture.overview.devices if device.device == "pi-1")
    assert (one.state, one.steps_done) == ("training", 499)


def test_why_a_device_failed_is_not_lost_among_its_progress(tmp_path):
    path = write_run(tmp_path)
    tell_on(
        path,
        events.DeviceProgress(round=2, device="pi-1", state="failed", reason="a hot processor"),
        events.DeviceProgress(round=2, device="pi-1", state="training", steps_done=1, steps_total=4),
    )
    source = Source(path, store_s=0)
    source.refresh()
    assert any(getattr(event, "reason", "") == "a hot processor" for event in source.picture.seen)


def test_rows_and_charts_say_what_the_report_says(tmp_path):
    path = write_run(tmp_path)
    tell_on(path, FINISHED)
    source = Source(path, store_s=0)
    source.refresh()
    report, state = source.picture.report, source.picture.overview
    assert state is not None
    first = rows.fleet(state.devices)[0]
    assert (first["device"], first["seen"], first["temperature"]) == ("pi-1", 2e9, "81 °C, throttled")
    assert [row["device"] for row in rows.present_round(state)] == ["pi-1", "pi-2", "pi-3"]
    assert [row["state"] for row in rows.present_round(state)] == ["merged", "failed", "quarantine"]
    merged = charts.metric_by_round(report)["series"]
    assert [(line["name"], line["data"]) for line in merged] == [("merged", [50.0])]
    down, up = charts.bytes_by_round(report)["series"]
    assert (down["data"], up["data"]) == ([2.0], [1.0])
    (point,) = charts.predicted_against_measured(report)["series"][0]["data"]
    assert point["value"] == [3.5, 3.5]
    (root,) = charts.family_tree(report)["series"][0]["data"]
    assert [leaf["name"] for leaf in root["children"][0]["children"]] == ["pi-1", "pi-2"]


def test_of_a_long_run_the_latest_points_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "MAX_POINTS", 5)
    source = Source(write_fleet(tmp_path, 3, 4), store_s=0)
    source.refresh()
    points = charts.predicted_against_measured(source.picture.report)["series"][0]["data"]
    rounds = [point["name"].split(", ")[1] for point in points]
    assert rounds == ["round 3"] * 2 + ["round 4"] * 3


def test_what_a_device_uses_stands_beside_what_it_has():
    capacity = Capacity(flops_per_s=8e9, used_flops_per_s=2.5e9, memory_bytes=600 * 2**20, used_memory_bytes=2**20)
    one = DeviceOverview(device="pi-1", state="training", capacity=capacity)
    assert [(row["speed"], row["memory"]) for row in rows.fleet([one])] == [
        ("~2.5 of 8 GFLOP/s", "~1.0 of 600.0 MiB"),
    ]
    measured = msgspec.structs.replace(one, capacity=msgspec.structs.replace(capacity, measured=True))
    assert rows.fleet([measured])[0]["speed"] == "2.5 of 8 GFLOP/s"
    assert rows.fleet([DeviceOverview(device="pi-2", state="ready")])[0]["speed"] == "-"


PLAIN = [{"key": key, "loss": 1} for key in "abc"]


@pytest.mark.parametrize(
    ("after", "changes"),
    [
        (PLAIN, Changes()),
        ([{"key": "a", "loss": 2}, *PLAIN[1:]], Changes(changed=[("a", {"loss": 2})])),
        ([{"key": "a", "why": "x"}, *PLAIN[1:]], Changes(changed=[("a", {"loss": None, "why": "x"})])),
        (PLAIN[1:], Changes(gone=["a"])),
        ([{"key": "new"}, *PLAIN], Changes(added=[(0, {"key": "new"})])),
        ([*PLAIN[1:], {"key": "new"}], Changes(gone=["a"], added=[(2, {"key": "new"})])),
        (PLAIN[::-1], None),
    ],
)
def test_of_a_table_only_what_is_new_travels(after, changes):
    assert differences(PLAIN, after) == changes


def test_changes_make_the_new_rows_of_the_old():
    rng = random.Random(1)
    before: list[rows.Row] = []
    for _ in range(200):
        stay = [row for row in before if rng.random() < 0.8]
        after = [{**row, "loss": rng.randrange(3)} for row in stay]
        for _ in range(rng.randrange(3)):
            after.insert(rng.randrange(len(after) + 1), {"key": str(rng.random()), "loss": 0})
        changes = differences(before, after)
        assert changes is not None
        assert patched(before, changes) == after
        before = after


def patched(before, changes):
    """As the page does it."""
    found = {row["key"]: dict(row) for row in before if row["key"] not in changes.gone}
    for key, fields in changes.changed:
        found[key].update(fields)
    made = list(found.values())
    for place, row in changes.added:
        made.insert(place, row)
    return made
