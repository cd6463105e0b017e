"""Prometheus' view of a run: what a scrape reads is what the events said."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reft_edge.coordinator import events
from reft_edge.coordinator.metrics import Metrics
from reft_edge.coordinator.records import Prediction
from reft_edge.metrics_page import serving
from reft_edge.wire.messages import Measured

TOOK = Measured(
    download_s=1.0, start_s=0.5, training_s=2.0, steps=8, peak_memory_bytes=9, temperature_celsius=81.0, throttled=True
)
STARTED = events.Started(
    run="r", federation="birds", resumed=False, round=1, rounds=2, model="mlp", parameters=40, global_bytes=160
)
PLANNED = events.Planned(
    round=1,
    attempt=1,
    excluded=[],
    devices=[
        events.PlannedDevice(
            device=device,
            variant="0.5",
            ratio=0.5,
            parameters=10,
            forward_macs=5,
            share=0.25,
            prediction=Prediction(download_s=1.0, training_s=2.5, steps=8),
            predicted_round_s=4.0,
        )
        for device in ("pi-1", "pi-2")
    ],
)
RECEIVED = events.UpdateSeen(round=1, device="pi-1", state="received", measured=TOOK)
CLOSED = events.RoundClosed(
    round=1,
    seconds=50.0,
    counted=1,
    asked=2,
    accuracy=0.5,
    traffic=[events.DeviceBytes(device="pi-1", down_bytes=2048, up_bytes=1024, full_model_bytes=160)],
)


@pytest.fixture
def scrape():
    """Metrics, and a way to read them as Prometheus would: name and labels -> value."""
    metrics = Metrics()
    with serving(metrics.registry, "0") as url:

        def read() -> dict[tuple[str, ...], float]:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  our own page on this machine
                text = answer.read().decode()
            return {
                (sample.name, *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }

        yield metrics, read


def test_a_scrape_reads_what_the_events_said(scrape):
    metrics, read = scrape
    for event in (STARTED, PLANNED, RECEIVED, CLOSED, CLOSED):
        metrics.show(event)
    found = read()
    expected = {
        ("reft_edge_round",): 1,
        ("reft_edge_rounds",): 2,
        ("reft_edge_device_seconds", "pi-1", "predicted"): 3.5,
        ("reft_edge_device_seconds", "pi-1", "measured"): 3.5,
        ("reft_edge_device_temperature_celsius", "pi-1"): 81.0,
        ("reft_edge_device_throttled", "pi-1"): 1,
        ("reft_edge_updates_total", "received"): 1,
        ("reft_edge_traffic_bytes_total", "pi-1", "down"): 4096,
        ("reft_edge_model_metric", "accuracy", "round"): 0.5,
        ("reft_edge_round_seconds_count",): 2,
        ("reft_edge_devices", "asked"): 1,
        ("reft_edge_devices", "done"): 1,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_state_that_nobody_is_in_any_more_says_zero(scrape):
    metrics, read = scrape
    metrics.show(PLANNED)
    assert read()[("reft_edge_devices", "asked")] == 2
    for device in ("pi-1", "pi-2"):
        metrics.show(events.DeviceProgress(round=1, device=device, state="training"))
    assert read()[("reft_edge_devices", "asked")] == 0


def test_what_came_with_a_rejected_update_is_counted_and_not_believed(scrape):
    metrics, read = scrape
    metrics.show(events.UpdateSeen(round=1, device="pi-9", state="rejected", reason="liar", measured=TOOK))
    found = read()
    assert found[("reft_edge_updates_total", "rejected")] == 1
    assert ("reft_edge_device_temperature_celsius", "pi-9") not in found
