"""Prometheus' view of one agent: what a scrape reads is how the agent is."""

from __future__ import annotations

import hashlib
import os
import queue
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from reft_edge.agent.metrics import AgentMetrics, resident_bytes
from reft_edge.agent.protocol import Configure
from reft_edge.agent.serving.counts import CountsFile, DeploymentCounts
from reft_edge.agent.serving.slots import Slot, Slots
from reft_edge.agent.session_words import Phase, SessionState
from reft_edge.agent.settings import AgentSettings, MetricsSettings
from reft_edge.agent.supervisor import Supervisor
from reft_edge.bundle.manifest import BlobRef
from reft_edge.data.settings import DataSettings
from reft_edge.errors import ConfigError, ResourceError
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.messages import (
    Done,
    Failed,
    Measured,
    Progress,
    Refused,
    Task,
    TrainingPlan,
    UpdateManifest,
    WeightsRef,
)
from reft_edge.wire.mqtt import MqttLink

Scrape = Callable[[], dict[tuple[str, ...], float]]

BLOB = BlobRef(sha256="0" * 64, size_bytes=1)
DONE = Done(
    task="r1-pi-1",
    round=1,
    update=UpdateManifest(blob=BLOB, codec=Int8(), training_samples=9),
    measured=Measured(download_s=1.0, start_s=0.5, training_s=2.5, steps=8, peak_memory_bytes=9),
)


class Agent:
    """The parts of a daemon that its metrics look at, none of them at work."""

    def __init__(self, spool: Path, settings: AgentSettings) -> None:
        self.state = SessionState()
        self.link = MqttLink(settings.broker, client_id=settings.device, events=queue.SimpleQueue())
        configure = Configure(
            device=settings.device, data=settings.data, base_dir="", spool=str(spool), limits=settings.limits
        )
        supervisor = Supervisor(configure, queue.SimpleQueue())
        self.metrics = AgentMetrics(
            settings, spool=spool, link=self.link, supervisor=supervisor, state=lambda: self.state
        )


def settings(address: str | None) -> AgentSettings:
    metrics = None if address is None else MetricsSettings(address=address)
    return AgentSettings(device="pi-1", federation="birds", data=DataSettings(path="data"), metrics=metrics)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path, settings("0"))
    yield agent
    agent.metrics.stop()


@pytest.fixture
def scrape(agent: Agent) -> Scrape:
    """Reads the page as Prometheus would: name and values of the labels, in the labels' order -> value."""
    url = agent.metrics.start()

    def read() -> dict[tuple[str, ...], float]:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  our own page on this machine
            text = answer.read().decode()
        return {
            (sample.name.removeprefix("reft_edge_agent_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return read


def test_an_idle_agent_tells_who_it_is_and_that_nothing_is_so(scrape: Scrape) -> None:
    found = scrape()
    (info,) = (name for name in found if name[0] == "info")
    assert info[1:3] == ("pi-1", "birds")
    nothing = [
        ("connected",),
        ("round",),
        ("training_seconds_total",),
        ("tasks_total", "", "done"),
        ("memory_bytes", "worker"),
    ]
    assert {name: found[name] for name in nothing} == dict.fromkeys(nothing, 0)
    assert {name[1]: value for name, value in found.items() if name[0] == "phase"} == {
        phase.value: phase is Phase.IDLE for phase in Phase
    }
    assert found[("memory_bytes", "daemon")] > 10 * 2**20
    assert not {name[0] for name in found} & {"served_info", "predictions_total"}


def test_the_task_in_hand_is_told(agent: Agent, scrape: Scrape) -> None:
    task = Task(
        task="r3-pi-1",
        round=3,
        run="run",
        bundle=BLOB,
        weights=WeightsRef(blob=BLOB),
        plan=TrainingPlan(local_epochs=1, batch_size=1, learning_rate=0.1, seed=0),
        deadline=1e9,
    )
    agent.state = SessionState(phase=Phase.TRAINING, task=task)
    found = scrape()
    assert (found[("round",)], found[("phase", "training")], found[("phase", "idle")]) == (3, 1, 0)


def test_an_end_counts_once_however_often_it_is_said(agent: Agent, scrape: Scrape) -> None:
    progress = Progress(task="r1-pi-1", state="training")
    for report in (progress, DONE, DONE, DONE):
        agent.metrics.said(report)
    agent.metrics.said(Refused(task="r2-pi-1", reason="too large"))
    agent.metrics.said(Failed(task="r3-pi-1", kind="out_of_memory", reason="300 MiB"))
    agent.metrics.said(msgspec.structs.replace(DONE, task="r4-pi-1", round=4))
    found = scrape()
    assert {name[1:]: value for name, value in found.items() if name[0] == "tasks_total"} == {
        ("", "done"): 2,
        ("", "refused"): 1,
        ("out_of_memory", "failed"): 1,
        ("crashed", "failed"): 0,
    }
    assert (found[("training_seconds_total",)], found[("training_steps_total",)]) == (5, 16)


def test_what_is_served_and_counted_is_told(tmp_path: Path, scrape: Scrape) -> None:
    slots = Slots(tmp_path / "serving")
    model = b"weights"
    slot = Slot(
        version="spring",
        deployment="d1",
        model="variant-0.50",
        precision="int8",
        sha256=hashlib.sha256(model).hexdigest(),
        size_bytes=len(model),
    )
    slots.install(slot, model)
    slots.switch()
    counts = tmp_path / "serving" / "counts"
    counts.mkdir()
    file = CountsFile(deployments={"d1": DeploymentCounts(predictions=7, errors=1, latency=[0, 8])})
    (counts / "1-1.json").write_bytes(msgspec.json.encode(file))
    found = scrape()
    assert found[("served_info", "d1", "variant-0.50", "int8", "spring")] == 1
    assert (found[("predictions_total",)], found[("prediction_errors_total",)]) == (7, 1)
    assert 0 < found[("prediction_latency_p95_seconds",)] < 0.001


def test_nothing_is_served_where_nobody_asked(tmp_path: Path) -> None:
    agent = Agent(tmp_path, settings(None))
    assert agent.metrics.start() == ""
    agent.metrics.said(DONE)
    agent.metrics.stop()


def test_a_port_that_is_taken_is_one_error(agent: Agent, tmp_path: Path) -> None:
    address = agent.metrics.start().split("/")[2]
    with pytest.raises(ResourceError, match="cannot be served"):
        Agent(tmp_path, settings(address)).metrics.start()


def test_what_is_no_address_is_refused_with_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('device = "a"\nfederation = "b"\n[data]\npath = "d"\n[metrics]\naddress = "here"\n')
    with pytest.raises(ConfigError, match="neither PORT nor HOST:PORT"):
        AgentSettings.read(file)


def test_the_memory_of_a_process_that_has_ended_is_nothing() -> None:
    assert resident_bytes(os.getpid()) > 10 * 2**20
    assert resident_bytes(2**22 + 1) == 0
