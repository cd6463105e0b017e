"""The agent's figures as Prometheus reads them: names, help, labels. Base units, `_total` for counters.

What the board does not tell, and what is not so (no model served, nothing counted), is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

import reft_edge
from reft_edge.agent.metrics import Figures
from reft_edge.agent.serving.slots import Slot
from reft_edge.agent.session_words import Phase
from reft_edge.metrics_page import PREFIX
from reft_edge.profiling.vitals import Vitals
from reft_edge.wire.deployment import PredictionCounts


def families(figures: Figures) -> Iterator[Metric]:
    """All of them."""
    yield _labelled(
        "info",
        "Which agent this is.",
        {"device": figures.device, "federation": figures.federation, "version": reft_edge.__version__},
    )
    yield _gauge("connected", "1 while connected to the broker.", figures.connected)
    yield _by("phase", "1 for what is being done.", "phase", {one.value: one is figures.phase for one in Phase})
    yield _gauge("round", "Of the task in hand; 0: none.", figures.round)
    tasks = CounterMetricFamily(_name("tasks"), "Tasks by how they ended.", labels=["outcome", "kind"])
    for outcome, count in sorted(figures.tasks.items()):
        tasks.add_metric(outcome, count)
    yield tasks
    yield _total("training_seconds", "Of tasks that were done.", figures.training_s)
    yield _total("training_steps", "Of tasks that were done.", figures.steps)
    traffic = CounterMetricFamily(_name("traffic_bytes"), "Payloads of messages.", labels=["direction"])
    traffic.add_metric(["down"], figures.received_bytes)
    traffic.add_metric(["up"], figures.sent_bytes)
    yield traffic
    memory = {"daemon": figures.daemon_bytes, "worker": figures.worker_bytes}
    yield _by("memory_bytes", "Resident memory; 0 of a worker that is not there.", "process", memory)
    yield from _vitals(figures.vitals)
    if figures.served is not None:
        yield _served(figures.served)
    if figures.counts is not None:
        yield from _predictions(figures.counts)


def _vitals(vitals: Vitals) -> Iterator[Metric]:
    told = (
        ("temperature_celsius", "Of the hottest processor sensor.", vitals.temperature_celsius),
        ("throttled", "1 where the processor has to slow down.", vitals.throttled),
        ("battery_ratio", "Charge, from 0 to 1.", vitals.battery_share),
        ("on_battery", "1 where the board lives on its battery.", vitals.on_battery),
    )
    for name, text, value in told:
        if value is not None:
            yield _gauge(name, text, value)


def _served(slot: Slot) -> Metric:
    what = {"version": slot.version, "model": slot.model, "precision": slot.precision, "deployment": slot.deployment}
    return _labelled("served_info", "What predictions are made with.", what)


def _predictions(counts: PredictionCounts) -> Iterator[Metric]:
    yield _total("predictions", "Samples, with the version that is served, since it came.", counts.predictions)
    yield _total("prediction_errors", "Requests that failed for a reason of ours.", counts.errors)
    if counts.latency_p95_s is not None:
        yield _gauge("prediction_latency_p95_seconds", "Of one request.", counts.latency_p95_s)


def _name(name: str) -> str:
    return f"{PREFIX}_agent_{name}"


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_name(name), text, value=value)


def _total(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(_name(name), text, value=value)


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(_name(name), text, labels=[label])
    for word, value in values.items():
        family.add_metric([word], value)
    return family


def _labelled(name: str, text: str, labels: dict[str, str]) -> Metric:
    """1, for what its labels say."""
    family = GaugeMetricFamily(_name(name), text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
