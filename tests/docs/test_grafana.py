"""The Grafana dashboard asks for what coordinator, monitor and agent tell, and has the form that Grafana takes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric

from reft_edge.agent.metric_families import families
from reft_edge.agent.metrics import Figures
from reft_edge.agent.serving.http_metrics import ServeMetrics
from reft_edge.agent.serving.slots import Slot
from reft_edge.agent.session_words import Phase
from reft_edge.coordinator import events
from reft_edge.coordinator.fleet_metrics import condition_families, deployment_families, presence_family
from reft_edge.coordinator.metrics import Metrics
from reft_edge.coordinator.records import (
    ConditionRecord,
    DeployedDevice,
    DeploymentRecord,
    Prediction,
    PresenceRecord,
)
from reft_edge.profiling.vitals import Vitals
from reft_edge.wire import deployment as wire
from reft_edge.wire.messages import Measured

FILE = Path(__file__).parents[2] / "docs" / "monitoring" / "grafana-dashboard.json"
BOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]

NAME = re.compile(r"\breft_edge_\w+")
LABELS_OF_A_SCRAPE = {"instance", "job"}
"""Prometheus adds these."""

TOOK = Measured(
    download_s=1.0, start_s=0.5, training_s=2.0, steps=8, peak_memory_bytes=9, temperature_celsius=81.0, throttled=True
)
COUNTS = wire.PredictionCounts(version="v", predictions=100, classes=(50, 50), latency_p95_s=0.1)


def of_a_run() -> Iterable[Metric]:
    """All that a coordinator tells of a run that had everything happen in it."""
    plan = events.PlannedDevice(
        device="pi",
        variant="0.5",
        ratio=0.5,
        parameters=1,
        forward_macs=1,
        share=0.5,
        prediction=Prediction(),
        predicted_round_s=1.0,
    )
    traffic = events.DeviceBytes(device="pi", down_bytes=1, up_bytes=1, full_model_bytes=1)
    metrics = Metrics()
    for event in (
        events.Planned(round=1, attempt=1, devices=[plan], excluded=[]),
        events.UpdateSeen(round=1, device="pi", state="received", measured=TOOK),
        events.RoundMerged(round=1, updates=1, accuracy=0.5),
        events.RoundClosed(round=1, seconds=1.0, counted=1, asked=1, traffic=[traffic]),
        events.RoundFailed(round=2, attempt=1, reason=""),
    ):
        metrics.show(event)
    return metrics.registry.collect()


def of_a_fleet() -> Iterator[Metric]:
    """All that coordinator and monitor tell of a fleet in which one device departs."""
    serving = wire.Served(deployment="d", version="v", model="m", precision="int8", sha256="0" * 64)
    vitals = wire.Vitals(temperature_celsius=50.0, throttled=False, battery_share=0.5, on_battery=True)
    odd = wire.PredictionCounts(version="v", predictions=100, classes=(0, 1000))
    counts = {"odd": odd} | {f"pi-{index}": COUNTS for index in range(5)}
    yield from condition_families(
        [
            ConditionRecord(
                device=device, condition=wire.Condition(serving=serving, counts=one, vitals=vitals), seen_at=1.0
            )
            for device, one in counts.items()
        ]
    )
    yield from deployment_families(
        [
            DeploymentRecord(
                deployment="d", federation="f", version="v", state="done", started_at=1, since=2, ended_at=3
            )
        ],
        [DeployedDevice(deployment="d", device="pi-1", model="m", wave="rest")],
    )
    yield presence_family([PresenceRecord(device="pi-1", online=True, at=1.0)])


def of_an_agent() -> Iterator[Metric]:
    """All that an agent tells that serves a model on a board with a battery."""
    return families(
        Figures(
            device="pi",
            federation="f",
            connected=True,
            phase=Phase.IDLE,
            round=0,
            tasks={("done", ""): 1},
            training_s=1.0,
            steps=1,
            received_bytes=1,
            sent_bytes=1,
            daemon_bytes=1,
            worker_bytes=1,
            vitals=Vitals(temperature_celsius=50.0, throttled=False, battery_share=0.5, on_battery=True),
            served=Slot(version="v", deployment="d", model="m", precision="int8", sha256="", size_bytes=1),
            counts=COUNTS,
        )
    )


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """Every series that is told, with its labels."""
    found: dict[str, set[str]] = defaultdict(set)
    for family in (*of_a_run(), *of_a_fleet(), *of_an_agent()):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


def expressions(panel: dict[str, Any]) -> list[tuple[str, str]]:
    return [(target["expr"], target["legendFormat"]) for target in panel["targets"]]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_is_told(panel: dict[str, Any], told: dict[str, set[str]]) -> None:
    for expression, legend in expressions(panel):
        names = NAME.findall(expression)
        assert names
        assert set(names) <= set(told)
        labels = set().union(*(told[name] for name in names)) | LABELS_OF_A_SCRAPE
        asked = re.findall(r"{{(\w+)}}", legend) + re.findall(r"[{,]\s*(\w+)\s*=", expression)
        asked += [
            word.strip()
            for group in re.findall(r"(?:by|on|group_left) \(([^)]*)\)", expression)
            for word in group.split(",")
        ]
        assert set(asked) <= labels


def test_all_that_is_told_is_shown_somewhere(told: dict[str, set[str]]) -> None:
    shown = {name for panel in PANELS for expression, _ in expressions(panel) for name in NAME.findall(expression)}
    shown |= {f"{name.removesuffix('_sum')}_bucket" for name in shown if name.endswith("_sum")}
    assert {name for name in told if not name.endswith("_created")} <= shown


def test_the_variables_are_filled_from_what_is_told(told: dict[str, set[str]]) -> None:
    source, device = BOARD["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    for name in NAME.findall(device["query"]["query"]):
        assert "device" in told[name]


def test_grafana_finds_the_fields_that_it_needs() -> None:
    assert BOARD["uid"]
    assert BOARD["title"]
    assert BOARD["schemaVersion"] >= 36  # datasources are named by type and uid
    assert "id" not in BOARD  # Grafana gives one
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        assert panel["description"]


def test_panels_neither_overlap_nor_leave_the_page() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    identities = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(identities)) == len(identities)


def test_the_page_beside_it_names_every_metric_with_its_labels(told: dict[str, set[str]]) -> None:
    rows = re.findall(r"^\| (`reft_edge_.*?) \|(.*?)\|", (FILE.parent / "README.md").read_text(), re.M)
    page = {
        name: set(filter(None, labels.strip().split(", "))) for names, labels in rows for name in NAME.findall(names)
    }
    parts = ("_sum", "_count", "_bucket")  # of a histogram
    expected: dict[str, set[str]] = {}
    for name, labels in told.items():
        if not name.endswith("_created"):
            part = next((end for end in parts if name.endswith(f"round_seconds{end}")), "")
            expected[name.removesuffix(part)] = labels - {"le"}
    assert page == expected


def test_the_page_beside_it_names_what_the_endpoint_tells() -> None:
    names = set(re.findall(r"^# TYPE (\w+)", ServeMetrics().page(None), re.M)) | {"reft_edge_serve_model_info"}
    assert set(re.findall(r"`(reft_edge_serve_\w+)`", (FILE.parent / "README.md").read_text())) == names
