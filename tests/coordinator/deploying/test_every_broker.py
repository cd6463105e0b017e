"""Versions go out, and back, over whatever broker there is."""

from __future__ import annotations

import hashlib

from tests.coordinator.deploying.fleet import states


def test_a_version_reaches_everybody_and_is_what_was_exported(fleet):
    for name in ("a", "b", "c"):
        fleet.device(name)
    outcome = fleet.deploy("run-1")
    assert outcome.record.state == "done"
    assert states(outcome) == dict.fromkeys("abc", "serving")
    assert [part.precision for part in outcome.devices] == ["int8"] * 3
    exported = (fleet.results / "run-1/models/global.int8.onnx").read_bytes()
    for device in fleet.devices.values():
        assert device.serving.version == "run-1"
        assert device.serving.sha256 == hashlib.sha256(exported).hexdigest()


def test_a_rollback_brings_back_what_was_served_before_and_again_changes_nothing(fleet):
    for name in "ab":
        fleet.device(name)
    fleet.deploy("run-1")
    fleet.finish_run("run-2", seed=2)
    fleet.deploy("run-2")
    for path in fleet.results.glob("*/models/*.onnx"):
        path.unlink()
    for _ in range(2):
        (outcome,) = fleet.roll_back()
        assert outcome.record.state == "rolled_back"
        assert states(outcome) == dict.fromkeys("ab", "rolled_back")
        assert {device.serving.version for device in fleet.devices.values()} == {"run-1"}
