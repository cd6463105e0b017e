"""Who is where in a round follows from the events alone, whatever order they come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from reft_edge.coordinator import events
from reft_edge.coordinator.overview import Tally, overview
from reft_edge.coordinator.records import Prediction, RunRecord
from reft_edge.coordinator.report.live import FleetView, PlainWatcher
from reft_edge.coordinator.run_files import RunFiles
from reft_edge.wire.messages import Measured

FILES = RunFiles(
    federation="birds",
    results=Path(),
    at_work=True,
    watched=True,
    devices=[],
    quarantined=[],
    presence=[],
    conditions=[],
    deployments=[],
    deployed=[],
    record=RunRecord(run="r", federation="birds", settings_digest="", created_at=1.0),
    directory=Path(),
)


def started(resumed=False):
    return events.Started(
        run="r", federation="birds", resumed=resumed, round=1, rounds=9, model="mlp", parameters=9, global_bytes=36
    )


def seen(device, online=True):
    return events.DeviceSeen(device=device, online=online, profile="pi-4", training_samples=9)


def planned(*devices, number=1, excluded=()):
    return events.Planned(
        round=number,
        attempt=1,
        devices=[
            events.PlannedDevice(
                device=device,
                variant="0.5",
                ratio=0.5,
                parameters=10,
                forward_macs=5,
                share=0.25,
                prediction=Prediction(download_s=1.0, training_s=2.0, peak_memory_bytes=50.0),
                predicted_round_s=4.0,
                training_flops=8e9,
            )
            for device in devices
        ],
        excluded=[events.Excluded(device=device, reason="no samples") for device in excluded],
    )


def opened(*devices, number=1):
    return events.RoundStarted(round=number, attempt=1, devices=list(devices), deadline=90.0, at=10.0)


def says(device, state, number=1, **more):
    return events.DeviceProgress(round=number, device=device, state=state, **more)


def update(device, state="received", number=1, **more):
    return events.UpdateSeen(round=number, device=device, state=state, **more)


BEGUN = [started(), *map(seen, "abc"), planned(*"abc"), opened(*"abc")]


def states(*told):
    return {one.device: one.state for one in overview(told, FILES).devices}


def collected(*late, number=1):
    return events.RoundCollected(round=number, counted=1, asked=3, late=list(late))


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ([], "asked"),
        ([says("a", "accepted")], "accepted"),
        ([says("a", "fetching")], "fetching"),
        ([says("a", "training", steps_done=3, steps_total=9)], "training"),
        ([says("a", "uploading")], "uploading"),
        ([says("a", "refused", reason="on battery")], "refused"),
        ([says("a", "failed", reason="no memory")], "failed"),
        ([update("a", "rejected", reason="too long")], "rejected"),
        ([update("a")], "done"),
        ([update("a"), collected("b"), events.RoundMerged(round=1, updates=1)], "merged"),
        ([update("a"), collected("b"), update("a", "rejected", reason="unlike the others")], "rejected"),
        ([says("a", "training"), collected("a")], "late"),
        ([says("a", "training"), collected("a"), says("a", "training")], "late"),
        ([says("a", "training"), events.RoundMerged(round=1, updates=2)], "late"),
        ([says("a", "training"), events.RoundFailed(round=1, attempt=1, reason="no quorum")], "late"),
        ([says("a", "training"), seen("a", online=False)], "absent"),
        ([says("a", "training"), seen("a", online=False), seen("a")], "training"),
        ([says("a", "training"), seen("a", online=False), says("a", "training")], "training"),
        ([update("a"), seen("a", online=False)], "offline"),
        ([says("a", "training"), started(resumed=True)], "absent"),
        ([says("a", "training"), started(resumed=True), seen("a")], "training"),
        ([events.Quarantined(device="a", reason="three bad updates"), planned("a", number=2)], "asked"),
        ([planned("b", number=2, excluded="a")], "left out"),
        ([planned("b", number=2)], "ready"),
    ],
)
def test_each_device_is_in_one_place(told, state):
    assert states(*BEGUN, *told)["a"] == state


def test_who_has_finished_its_part_is_remembered_when_it_leaves():
    told = [*BEGUN, update("a"), collected("b", "c"), events.RoundMerged(round=1, updates=1), seen("a", online=False)]
    one = overview(told, FILES).devices[0]
    assert (one.state, one.part, one.online) == ("offline", "merged", False)


def test_an_update_for_a_round_that_is_over_does_not_hide_the_present_task():
    told = [*BEGUN, collected(*"abc"), planned(*"abc", number=2), opened(*"abc", number=2)]
    told += [says("a", "fetching", number=2), update("a", "late")]
    one = overview(told, FILES).devices[0]
    assert (one.state, one.updates) == ("fetching", {"late": 1})


def test_a_deadline_that_moves_is_known_until_collecting_ends():
    view = FleetView()
    deadlines = []
    for event in [*BEGUN, events.RoundExtended(round=1, deadline=150.0), collected("a")]:
        view.apply(event)
        deadlines.append(view.deadline)
    assert deadlines[-3:] == [90.0, 150.0, None]


def test_late_devices_are_named_where_lines_are_printed():
    lines = []
    watcher = PlainWatcher(lines.append)
    for event in [*BEGUN, collected("a", "c")]:
        watcher.show(event)
    assert lines[-1] == "round 1: 1 of 3 updates came in; late: a, c"


def test_what_a_variant_takes_is_planned_first_and_then_measured():
    took = Measured(download_s=1.0, start_s=0.5, training_s=4.0, steps=8, peak_memory_bytes=70)
    tally = Tally()
    for event in BEGUN:
        tally.add(event)
    before = tally.overview(FILES).devices[0]
    assert before.expected_at == 14.0
    assert (before.capacity.used_flops_per_s, before.capacity.used_memory_bytes) == (4e9, 50.0)
    assert not before.capacity.measured
    tally.add(update("a", measured=took))
    after = tally.overview(FILES).devices[0].capacity
    assert (after.used_flops_per_s, after.used_memory_bytes, after.measured) == (2e9, 70, True)
    tally.add(planned("a", number=2))
    assert not tally.overview(FILES).devices[0].capacity.measured
