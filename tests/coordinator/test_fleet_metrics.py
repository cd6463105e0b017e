"""Prometheus' view of the fleet: what a scrape reads is what the store says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from reft_edge.coordinator.fleet_metrics import FleetFigures
from reft_edge.coordinator.records import ConditionRecord, DeployedDevice, DeploymentRecord, PresenceRecord
from reft_edge.errors import FederationError
from reft_edge.wire.deployment import Condition, PredictionCounts, Served, Vitals


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the store says."""

    presence: list[PresenceRecord] = field(default_factory=list)
    conditions: list[ConditionRecord] = field(default_factory=list)
    deployments: list[DeploymentRecord] = field(default_factory=list)
    deployed: list[DeployedDevice] = field(default_factory=list)


ROLLOUT = DeploymentRecord(
    deployment="d2", federation="birds", version="spring", state="soaking", started_at=100.0, since=130.0
)
BEFORE = DeploymentRecord(
    deployment="d1", federation="birds", version="winter", state="done", started_at=1.0, since=2.0, ended_at=9.0
)


def condition(device: str, classes: tuple[int, ...] = (50, 50), *, vitals: Vitals | None = None) -> ConditionRecord:
    serving = Served(deployment="d2", version="spring", model="global", precision="int8", sha256="0" * 64)
    counts = PredictionCounts(version="spring", predictions=sum(classes), errors=2, classes=classes)
    return ConditionRecord(
        device=device, condition=Condition(serving=serving, counts=counts, vitals=vitals), seen_at=120.0
    )


def read(look: Callable[[], Told]) -> dict[tuple[str, ...], float]:
    """Name and values of the labels, in the labels' order -> value."""
    registry = CollectorRegistry()
    registry.register(FleetFigures(look))
    return {
        (sample.name.removeprefix("reft_edge_"), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_the_latest_deployment_is_told_with_how_far_it_is() -> None:
    part = DeployedDevice(deployment="d2", device="pi-1", model="global", wave="canary", state="serving")
    waiting = DeployedDevice(deployment="d2", device="pi-2", model="global", wave="rest")
    found = read(lambda: Told(deployments=[ROLLOUT, BEFORE], deployed=[part, waiting]))
    assert found[("deployment_info", "d2", "soaking", "spring")] == 1
    assert (found[("deployment_devices", "serving")], found[("deployment_devices", "waiting")]) == (1, 1)
    assert found[("deployment_devices", "failed")] == 0
    assert found[("deployment_start_timestamp_seconds",)] == 100
    assert ("deployment_end_timestamp_seconds",) not in found


def test_a_device_tells_what_it_serves_and_how_it_is() -> None:
    warm = Vitals(temperature_celsius=71.5, throttled=True)
    presence = [PresenceRecord(device="pi-1", online=True, at=1.0), PresenceRecord(device="pi-2", online=False, at=1.0)]
    found = read(lambda: Told(conditions=[condition("pi-1", vitals=warm), condition("pi-2")], presence=presence))
    assert found[("device_served_info", "pi-1", "global", "int8", "spring")] == 1
    assert found[("served_devices", "spring")] == 2
    assert (found[("device_vitals_temperature_celsius", "pi-1")], found[("device_vitals_throttled", "pi-1")]) == (
        71.5,
        1,
    )
    assert ("device_vitals_temperature_celsius", "pi-2") not in found
    assert ("device_vitals_battery_ratio", "pi-1") not in found
    assert (found[("device_online", "pi-1")], found[("device_online", "pi-2")]) == (1, 0)
    assert (found[("device_predictions_total", "pi-1", "spring")]) == 100
    assert (found[("device_prediction_errors_total", "pi-2", "spring")]) == 2
    assert found[("device_condition_timestamp_seconds", "pi-1")] == 120


def test_a_departure_is_a_figure_and_none_is_a_zero() -> None:
    alike = [condition(f"pi-{index}", (500, 500)) for index in range(6)]
    assert read(lambda: Told(conditions=alike))[("departures", "classes")] == 0
    found = read(lambda: Told(conditions=[*alike, condition("odd", (0, 1000))]))
    assert found[("departures", "classes")] == 1
    assert 0.28 < found[("device_departure_distance", "classes", "odd", "spring")] <= 1


def test_of_a_device_that_tells_only_errors_it_is_not_said_that_it_predicts_nothing() -> None:
    quiet = ConditionRecord(
        device="pi-1", condition=Condition(counts=PredictionCounts(version="spring", errors=3)), seen_at=1.0
    )
    found = read(lambda: Told(conditions=[quiet]))
    assert found[("device_prediction_errors_total", "pi-1", "spring")] == 3
    assert ("device_predictions_total", "pi-1", "spring") not in found


def test_without_a_store_there_are_no_figures_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    def look() -> Told:
        raise FederationError("nothing was ever run here")

    assert read(look) == {}
    assert "nothing was ever run here" in caplog.text


def test_an_empty_fleet_says_so() -> None:
    found = read(Told)
    assert set(found.values()) == {0}
    assert ("deployment_devices", "serving") in found
