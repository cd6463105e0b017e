"""The coordinator's figures for Prometheus, made from its events for `metrics_page` to serve.

Metrics say what is so now; the store and the report say what was. After a restart counters begin at 0 again, as
Prometheus expects of a process. Names follow its conventions: base units, `_total` for counters.
"""

from __future__ import annotations

from collections import Counter as Count

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from reft_edge.coordinator.events import (
    Distilling,
    Event,
    Planned,
    RoundClosed,
    RoundDistilled,
    RoundFailed,
    RoundMerged,
    Started,
    UpdateSeen,
)
from reft_edge.coordinator.report.live import FleetView
from reft_edge.metrics_page import PREFIX

ROUND_SECONDS = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14_400, 43_200, 86_400)
"""Bounds of the histogram's buckets: from a demo on one machine to a fleet that trains overnight."""


class Metrics:
    """Everything that is counted or gauged; `show` takes in an event."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._view = FleetView()
        self._states: set[str] = set()
        self._round = self._gauge("round", "Round that is worked on, from 1.")
        self._rounds = self._gauge("rounds", "Rounds that the run shall have.")
        self._metric = self._gauge("model_metric", "The global model on test data.", "metric", "stage")
        self._devices = self._gauge("devices", "Devices by what they do.", "state")
        self._steps = self._gauge("device_steps", "Training steps of the round.", "device", "kind")
        self._seconds = self._gauge("device_seconds", "Of a device's round, without the upload.", "device", "kind")
        self._memory = self._gauge("device_peak_memory_bytes", "Of the training process.", "device", "kind")
        self._temperature = self._gauge("device_temperature_celsius", "As it finished its last task.", "device")
        self._throttled = self._gauge("device_throttled", "1 where the processor had to slow down.", "device")
        self._share = self._gauge("device_model_share", "Parameters of its variant over the whole model's.", "device")
        self._distilling = self._gauge("distillation_epoch", "Epoch of the distillation.")
        self._updates = self._counter("updates", "Announced updates by what became of them.", "state")
        self._bytes = self._counter("traffic_bytes", "Blobs that devices' links carried.", "device", "direction")
        self._failed = self._counter("rounds_failed", "Attempts at a round that found no quorum.")
        self._duration = Histogram(
            "round_seconds",
            "From planning to the round's end.",
            namespace=PREFIX,
            registry=self.registry,
            buckets=ROUND_SECONDS,
        )

    def show(self, event: Event) -> None:
        """Take in an event."""
        self._view.apply(event)
        self._count_devices()
        match event:
            case Started():
                self._rounds.set(event.rounds)
                self._round.set(event.round)
            case Planned():
                self._planned(event)
            case UpdateSeen():
                self._updated(event)
            case RoundMerged():
                self._measured("merged", accuracy=event.accuracy, mse=event.mse)
            case Distilling():
                self._distilling.set(event.epoch)
            case RoundDistilled():
                self._measured("distilled", accuracy=event.accuracy, mse=event.mse)
            case RoundClosed():
                self._closed(event)
            case RoundFailed():
                self._failed.inc()
            case _:
                pass

    def _planned(self, event: Planned) -> None:
        self._round.set(event.round)
        for plan in event.devices:
            expected = plan.prediction
            self._share.labels(plan.device).set(plan.share)
            self._seconds.labels(plan.device, "predicted").set(
                expected.download_s + expected.start_s + expected.training_s
            )
            self._memory.labels(plan.device, "predicted").set(expected.peak_memory_bytes)
            self._steps.labels(plan.device, "planned").set(expected.steps)

    def _updated(self, event: UpdateSeen) -> None:
        self._updates.labels(event.state).inc()
        took = event.measured
        if took is None or event.state in ("rejected", "duplicate"):
            return
        self._seconds.labels(event.device, "measured").set(took.download_s + took.start_s + took.training_s)
        self._memory.labels(event.device, "measured").set(took.peak_memory_bytes)
        self._steps.labels(event.device, "done").set(took.steps)
        if took.temperature_celsius is not None:
            self._temperature.labels(event.device).set(took.temperature_celsius)
        if took.throttled is not None:
            self._throttled.labels(event.device).set(took.throttled)

    def _closed(self, event: RoundClosed) -> None:
        self._duration.observe(event.seconds)
        self._measured("round", accuracy=event.accuracy, mse=event.mse)
        for carried in event.traffic:
            self._bytes.labels(carried.device, "down").inc(carried.down_bytes)
            self._bytes.labels(carried.device, "up").inc(carried.up_bytes)

    def _measured(self, stage: str, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self._metric.labels(name, stage).set(value)

    def _count_devices(self) -> None:
        """States that nobody is in any more say 0, and do not vanish."""
        counts = Count(row.state for row in self._view.devices.values())
        self._states |= counts.keys()
        for state in self._states:
            self._devices.labels(state).set(counts[state])

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)
