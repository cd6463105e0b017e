"""What is said of a deployment and of what devices predict is what lies on disk."""

from __future__ import annotations

from typing import get_args

import pytest

from reft_edge.coordinator import events
from reft_edge.coordinator.drift import departures
from reft_edge.coordinator.overview import DeviceOverview
from reft_edge.coordinator.records import DeployedState, DeploymentState
from reft_edge.coordinator.report.record import gather
from reft_edge.coordinator.store import Store
from reft_edge.dashboard import charts, deployment_rows
from reft_edge.dashboard.source import Source
from tests.written_deployment import asked, condition, counts, health, served, write_rollout
from tests.written_run import SETTINGS, told, write_run


def test_every_state_has_words():
    assert set(get_args(DeploymentState)) == set(deployment_rows.DEPLOYMENT_WORDS)
    assert set(get_args(DeployedState)) == set(deployment_rows.DEVICE_WORDS)


@pytest.mark.parametrize(
    ("state", "marks"),
    [
        ("canary", ["now", "", "", ""]),
        ("rolling_out", ["done", "done", "now", ""]),
        ("done", ["done"] * 4),
        ("rolled_back", [""] * 4),
    ],
)
def test_steps_are_behind_at_hand_or_to_come(state, marks):
    assert [deployment_rows.step_state(step, state) for step in deployment_rows.STEPS] == marks


def test_of_two_files_the_one_that_is_served_is_shown():
    both = (health("float32", 0.9, 0.8), health("int8", 0.7, 0.8))
    one = asked("d-1", "pi-1", state="serving", precision="int8", health=both, answered_at=1e9 + 103)
    (row,) = deployment_rows.rollout([one], metric="accuracy")
    assert (row["precision"], row["before"], row["after"], row["took"]) == ("int8", "80.0%", "70.0%", "2.00 s")
    (row,) = deployment_rows.rollout([asked("d-1", "pi-1", state="refused", health=both)], metric="mse")
    assert (row["precision"], row["after"]) == ("float32, not taken", "0.9")
    (row,) = deployment_rows.rollout([asked("d-1", "pi-1")], metric="accuracy")
    assert {row[name] for name in ("precision", "before", "after", "p95", "memory", "took")} == {"-"}


def test_what_most_devices_serve_comes_first():
    versions = ("a", "b", "b", None)
    devices = [
        DeviceOverview(device=f"pi-{n}", state="ready", serving=version and served("d-1", version=version))
        for n, version in enumerate(versions)
    ]
    found = [(row["version"], row["devices"]) for row in deployment_rows.served(devices)]
    assert found == [("b", 2), ("a", 1)]


def test_a_device_that_departs_comes_first_and_its_shares_stand_beside_the_others():
    usual = [condition("d-1", f"pi-{n}", told=counts((100 + n, 98, 95))) for n in range(2, 8)]
    odd = condition("d-1", "pi-9", told=counts((0, 10, 290)))
    silent = condition("d-1", "pi-8")
    conditions = [*usual, silent, odd]
    first, *rest = deployment_rows.predicting(conditions, departures(conditions))
    assert (first["device"], first["departs"], first["predictions"]) == ("pi-9", "classes", 300)
    assert [row["departs"] for row in rest] == [""] * len(usual)
    own, others = charts.classes(conditions, "pi-9", ("robin", "wren"))["series"]
    assert own["data"] == [0.0, 3.33, 96.67]
    assert [round(share) for share in others["data"]] == [35, 33, 32]
    assert charts.classes(conditions, "pi-9", ("robin", "wren"))["xAxis"]["data"] == ["robin", "wren", "2"]
    assert charts.classes(conditions, "pi-8", ())["series"] == []


def test_shares_are_compared_with_those_of_the_same_version_only():
    conditions = [
        condition("d-1", "pi-1", told=counts((90, 10))),
        condition("d-1", "pi-2", told=counts((10, 90), version="another")),
    ]
    (only,) = charts.classes(conditions, "pi-1", ())["series"]
    assert (only["name"], only["data"]) == ("pi-1", [90.0, 10.0])


def test_a_picture_has_deployments_and_departures(tmp_path):
    source = Source(write_run(tmp_path), store_s=0)
    source.refresh()
    assert source.picture.deployments == ()
    write_rollout(tmp_path)
    assert source.refresh()
    picture = source.picture
    assert [one.deployment for one in picture.deployments] == ["d-2", "d-1"]
    assert [one.device for one in picture.deployed] == [f"pi-{n}" for n in range(1, 6)]
    assert [(one.device, one.aspect) for one in picture.departures] == [("pi-1", "classes")]
    assert picture.overview is not None
    one = picture.overview.devices[0]
    assert (one.temperature_celsius, one.battery_share, one.on_battery) == (48.5, 0.8, True)
    assert [device.state for device in picture.overview.devices if device.device == "pi-4"] == ["offline"]


def test_models_may_be_deployed_where_none_was_trained(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text(SETTINGS)
    Store(tmp_path / "federation").close()
    source = Source(path, store_s=0)
    source.refresh()
    assert "has no run yet" in source.picture.trouble
    write_rollout(tmp_path)
    assert source.refresh()
    assert source.picture.trouble == ""
    assert source.picture.overview is not None
    assert (source.picture.overview.run, len(source.picture.overview.devices)) == ("", 6)


def test_exported_files_tell_who_serves_them():
    report = gather([*told(), events.Exported(name="global.int8", path="x", values={})])
    devices = [DeviceOverview(device="pi-1", state="ready", serving=served("d-1"))]
    (root,) = charts.family_tree(report, devices)["series"][0]["data"]
    assert [leaf["name"] for leaf in root["children"][-1]["children"]] == ["global.int8: 1 serve"]
