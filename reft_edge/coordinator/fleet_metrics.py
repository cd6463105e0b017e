"""The fleet between and beside the rounds, for Prometheus: deployments, what is served, how the devices are.

`coordinator --metrics` and `monitor --metrics` serve these. They are looked up when the page is read, so they say what
the store says then, whoever wrote it. Names follow Prometheus' conventions: base units, `_total` for counters, `_info`
for a 1 whose labels say it. What a device does not tell is left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, get_args

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from reft_edge.coordinator.drift import Aspect, departures
from reft_edge.coordinator.records import (
    ConditionRecord,
    DeployedDevice,
    DeployedState,
    DeploymentRecord,
    PresenceRecord,
)
from reft_edge.errors import ReftError
from reft_edge.metrics_page import PREFIX

_log = logging.getLogger(__name__)


class Fleet(Protocol):
    """What is asked of `run_files.FleetFiles`."""

    @property
    def presence(self) -> Sequence[PresenceRecord]: ...

    @property
    def conditions(self) -> Sequence[ConditionRecord]: ...

    @property
    def deployments(self) -> Sequence[DeploymentRecord]: ...

    @property
    def deployed(self) -> Sequence[DeployedDevice]: ...


class FleetFigures:
    """To be registered with a `CollectorRegistry`. `look` reads the store; while it cannot, there are no figures."""

    def __init__(self, look: Callable[[], Fleet]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """All figures as they are now; called by the page."""
        try:
            fleet = self._look()
        except ReftError as exc:
            _log.warning("no figures of the fleet: %s", exc)
            return
        yield from deployment_families(fleet.deployments, fleet.deployed)
        yield from condition_families(fleet.conditions)
        yield presence_family(fleet.presence)


def deployment_families(deployments: Sequence[DeploymentRecord], devices: Sequence[DeployedDevice]) -> Iterator[Metric]:
    """Of the latest deployment, the first of `deployments`, and `devices` of it."""
    by_state = Counter(one.state for one in devices)
    yield _family(
        "deployment_devices",
        "Devices of the latest deployment by what they do.",
        ("state",),
        (((state,), by_state[state]) for state in get_args(DeployedState)),
    )
    if not deployments:
        return
    latest = deployments[0]
    yield _family(
        "deployment_info",
        "The latest deployment.",
        ("deployment", "version", "state"),
        [((latest.deployment, latest.version, latest.state), 1)],
    )
    yield _family("deployment_start_timestamp_seconds", "Of the latest.", (), [((), latest.started_at)])
    if latest.ended_at is not None:
        yield _family("deployment_end_timestamp_seconds", "Of the latest.", (), [((), latest.ended_at)])


def presence_family(presence: Sequence[PresenceRecord]) -> Metric:
    """Who is there."""
    values = (((one.device,), one.online) for one in presence)
    return _family("device_online", "1 while it is there, as far as anybody listened.", ("device",), values)


def condition_families(conditions: Sequence[ConditionRecord]) -> Iterator[Metric]:
    """What devices said of themselves last, and which depart from the others."""
    yield from _served(conditions)
    yield from _vitals(conditions)
    yield from _predictions(conditions)
    yield _family(
        "device_condition_timestamp_seconds",
        "When it last said how it is.",
        ("device",),
        (((one.device,), one.seen_at) for one in conditions),
    )
    found = departures(conditions)
    by_aspect = Counter(one.aspect for one in found)
    yield _family(
        "departures",
        "Devices whose predictions are unlike the others'.",
        ("aspect",),
        (((aspect,), by_aspect[aspect]) for aspect in get_args(Aspect)),
    )
    yield _family(
        "device_departure_distance",
        "From the others' predictions, from 0 to 1; of those that depart.",
        ("device", "version", "aspect"),
        (((one.device, one.version, one.aspect), one.distance) for one in found),
    )


def _served(conditions: Sequence[ConditionRecord]) -> Iterator[Metric]:
    served = [(record.device, record.condition.serving) for record in conditions]
    yield _family(
        "device_served_info",
        "What it predicts with.",
        ("device", "version", "model", "precision"),
        (((device, one.version, one.model, one.precision), 1) for device, one in served if one is not None),
    )
    by_version = Counter(one.version for _, one in served if one is not None)
    yield _family(
        "served_devices",
        "Devices by the version that they serve.",
        ("version",),
        (((version,), count) for version, count in sorted(by_version.items())),
    )


def _vitals(conditions: Sequence[ConditionRecord]) -> Iterator[Metric]:
    told = [(record.device, record.condition.vitals) for record in conditions if record.condition.vitals is not None]
    for name, text, field in (
        ("temperature_celsius", "As it last said, also between rounds.", "temperature_celsius"),
        ("throttled", "1 where the processor has to slow down.", "throttled"),
        ("battery_ratio", "Charge, from 0 to 1.", "battery_share"),
        ("on_battery", "1 where it lives on its battery.", "on_battery"),
    ):
        values = ((device, getattr(vitals, field)) for device, vitals in told)
        yield _family(
            f"device_vitals_{name}",
            text,
            ("device",),
            (((device,), value) for device, value in values if value is not None),
        )


def _predictions(conditions: Sequence[ConditionRecord]) -> Iterator[Metric]:
    """Counters of the version that is served: they begin anew with the next, which is another series."""
    predictions = CounterMetricFamily(
        f"{PREFIX}_device_predictions", "Samples, since it serves the version.", labels=["device", "version"]
    )
    errors = CounterMetricFamily(
        f"{PREFIX}_device_prediction_errors", "Requests that failed for a reason of ours.", labels=["device", "version"]
    )
    for record in conditions:
        if (counts := record.condition.counts) is not None:
            errors.add_metric([record.device, counts.version], counts.errors)
            if counts.predictions:  # else its owner does not let it tell
                predictions.add_metric([record.device, counts.version], counts.predictions)
    yield predictions
    yield errors


def _family(name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=list(labels))
    for words, value in values:
        family.add_metric(list(words), value)
    return family
