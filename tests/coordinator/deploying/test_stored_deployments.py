"""Deployments, conditions and presence in the store."""

from __future__ import annotations

from contextlib import closing

import pytest

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator import tables
from reft_edge.coordinator.deploying.standing import kept_blobs
from reft_edge.coordinator.records import (
    ConditionRecord,
    DeployedDevice,
    DeploymentRecord,
    ExportRecord,
    PresenceRecord,
    ReleasedModel,
    RunRecord,
)
from reft_edge.coordinator.store import Store
from reft_edge.wire.deployment import Condition, Health, HealthRules, ModelFile, Vitals

HEALTH = Health(precision="int8", latency_p50_s=1, latency_p95_s=2, latency_p99_s=3, peak_memory_bytes=4)


def ref(letter):
    return BlobRef(sha256=letter * 64, size_bytes=7)


def record(name, *, at, state="canary", letter="a"):
    file = ModelFile(blob=ref(letter), size_bytes=9, precision="float32", test_metric=0.5)
    model = ReleasedModel(name="global", files=(file,), sha256s=("f" * 64,))
    return DeploymentRecord(
        deployment=name,
        federation="birds",
        version=f"v-{name}",
        state=state,
        started_at=at,
        since=at,
        models=(model,),
        classes=("robin",),
        rules=HealthRules(min_accuracy=0.5),
    )


def part(name, device, **changes):
    return DeployedDevice(deployment=name, device=device, model="global", wave="rest", **changes)


@pytest.fixture
def store(tmp_path):
    with closing(Store(tmp_path)) as opened:
        yield opened


def test_a_deployment_comes_back_as_it_was(store, tmp_path):
    parts = [
        part("d1", "b", state="serving", health=(HEALTH,), precision="int8", asked_at=2.0, undone=True),
        part("d1", "a"),
    ]
    store.begin_deployment(record("d1", at=1.0), parts)
    with closing(Store(tmp_path, shared=True)) as beside:
        assert beside.deployments("birds") == [record("d1", at=1.0)]
        assert beside.deployed_devices("d1") == sorted(parts, key=lambda one: one.device)
        assert beside.deployments("fish") == []


def test_a_new_deployment_ends_those_before_it(store):
    store.begin_deployment(record("d1", at=1.0, state="done"), [])
    store.begin_deployment(record("d2", at=2.0, state="rolling_out"), [])
    store.begin_deployment(record("d3", at=3.0), [])
    found = [(one.deployment, one.state, one.ended_at) for one in store.deployments("birds")]
    assert found == [("d3", "canary", None), ("d2", "interrupted", 3.0), ("d1", "done", 2.0)]
    assert store.latest_deployment("birds").deployment == "d3"
    assert "v-d3 was deployed instead" in store.deployments("birds")[1].reason


def test_a_device_goes_by_the_last_deployment_that_asked_it(store):
    store.begin_deployment(record("d1", at=1.0, letter="a"), [part("d1", name, asked_at=1.0) for name in "abc"])
    store.begin_deployment(record("d2", at=2.0, letter="b"), [part("d2", "b", asked_at=2.0), part("d2", "c")])
    assert [(one.device, one.deployment) for one in store.standing_parts("birds")] == [
        ("a", "d1"),
        ("b", "d2"),
        ("c", "d1"),
    ]
    assert store.standing_part("birds", "b").deployment == "d2"
    assert store.standing_part("birds", "z") is None
    assert kept_blobs(store, "birds") == {"a" * 64, "b" * 64}
    store.save_deployed_device(part("d2", "b", asked_at=2.0, undone=True))
    assert kept_blobs(store, "birds") == {"a" * 64}


def test_who_has_gone_back_goes_by_the_deployment_before(store):
    for place, letter in enumerate("abc", start=1):
        asked = part(f"d{place}", "x", asked_at=float(place), state="serving")
        store.begin_deployment(record(f"d{place}", at=float(place), letter=letter), [asked])
    undone = part("d3", "x", asked_at=3.0, undone=True, state="away")
    store.save_deployed_device(undone)
    assert store.standing_part("birds", "x") == undone  # it has not heard of it
    assert [one.deployment for one in store.parts_before("birds")] == ["d2"]
    store.save_deployed_device(part("d3", "x", asked_at=3.0, undone=True, state="rolled_back"))
    assert store.standing_part("birds", "x").deployment == "d2"
    assert [one.deployment for one in store.parts_before("birds")] == ["d1"]


def test_files_stay_that_a_device_has_not_taken_and_may_still_be_given(store):
    store.begin_deployment(record("d1", at=1.0, letter="a"), [part("d1", "x", asked_at=1.0, state="away")])
    store.begin_deployment(record("d2", at=2.0, letter="b"), [part("d2", "x", asked_at=2.0, state="away")])
    assert kept_blobs(store, "birds") == {"a" * 64, "b" * 64}
    store.save_deployed_device(part("d2", "x", asked_at=2.0, undone=True, state="rolled_back"))
    assert kept_blobs(store, "birds") == {"a" * 64}
    store.save_deployed_device(part("d1", "x", asked_at=1.0, state="serving"))
    store.begin_deployment(record("d3", at=3.0, letter="c"), [part("d3", "x", asked_at=3.0)])
    assert kept_blobs(store, "birds") == {"c" * 64}  # what it serves lies on it


def test_of_conditions_and_presence_the_last_is_kept(store):
    for celsius in (40.0, 50.0):
        told = Condition(vitals=Vitals(temperature_celsius=celsius))
        store.save_heard(
            conditions=[ConditionRecord(device="a", condition=told, seen_at=celsius)],
            presence=[PresenceRecord(device="a", online=celsius < 45, at=celsius)],
        )
    (kept,) = store.conditions()
    assert (kept.condition.vitals.temperature_celsius, kept.seen_at) == (50.0, 50.0)
    assert store.presence() == [PresenceRecord(device="a", online=False, at=50.0)]


def test_what_was_seeded_is_known_until_it_is_cleared(store):
    store.remember_seeded([ref("a"), ref("b")])
    store.remember_seeded([ref("a")])
    store.forget_seeded([ref("b")])
    assert store.seeded() == [ref("a")]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("schema", tables.EXTENDED_SCHEMAS)
def test_an_older_store_is_extended_and_keeps_what_it_holds(tmp_path, schema, shared):
    with closing(Store(tmp_path)) as old:
        old.create_run(RunRecord(run="run-1", federation="birds", settings_digest="", created_at=1.0))
        old.save_export("run-1", ExportRecord(name="global", path="global.onnx", values={"accuracy": 0.5}))
    with closing(Store(tmp_path)) as old, old._transaction() as connection:
        for table in ("deployed_devices", "deployments", "conditions", "presence", "seeded") if schema == 3 else ():
            connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.exec_driver_sql("ALTER TABLE exports DROP COLUMN sha256")
        connection.exec_driver_sql(f"PRAGMA user_version = {schema}")
    with closing(Store(tmp_path, shared=shared)) as opened:
        assert opened.exports("run-1") == [ExportRecord(name="global", path="global.onnx", values={"accuracy": 0.5})]
        assert opened.deployments("birds") == []
        opened.begin_deployment(record("d1", at=1.0), [part("d1", "a")])
        with opened._transaction() as connection:
            assert connection.exec_driver_sql("PRAGMA user_version").scalar_one() == tables.SCHEMA
