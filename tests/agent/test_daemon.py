"""The agent as a user runs it, against real brokers: killed, cut off and misled at chosen moments."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from reft_edge.agent.spool import Spool
from reft_edge.bundle.bundle import Bundle
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.wire.messages import (
    Accepted,
    Close,
    Done,
    Failed,
    ProfileAnnouncement,
    Progress,
    Refused,
    Status,
    TrainingPlan,
)
from tests.agent.conftest import AgentProcess
from tests.agent.coordinator_side import TIMEOUT_S, CoordinatorSide, wait_until

PLAN = TrainingPlan(local_epochs=2, batch_size=16, learning_rate=0.1, seed=11)

pytestmark = pytest.mark.usefixtures("data_file")


def slow(bundle: Bundle, seconds_per_step: float) -> str:
    """A limit that makes each step on 16 samples take this long: time to interrupt it."""
    return f"training_flops_per_s = {bundle.manifest.cost.step_flops(16) / seconds_per_step}"


class Pair:
    """An agent and a coordinator's side on one broker."""

    def __init__(
        self, broker: RunningBroker, federation: str, directory: Path, make_agent: Callable[..., AgentProcess]
    ) -> None:
        self.coordinator = CoordinatorSide(broker.settings, federation, f"{federation}-dev", directory)
        self._make = lambda **options: make_agent(broker.settings, federation, **options)

    def start(self, **options: str) -> AgentProcess:
        """Start the agent and wait for its announcement."""
        heard = len(self.coordinator.heard)
        agent: AgentProcess = self._make(**options).start()
        self.coordinator.wait_for(ProfileAnnouncement, after=heard)
        return agent

    def stopped(self, **options: str) -> AgentProcess:
        agent: AgentProcess = self._make(**options)
        return agent


@pytest.fixture
def pair(
    some_broker: RunningBroker, federation: str, tmp_path: Path, make_agent: Callable[..., AgentProcess]
) -> Iterator[Pair]:
    made = Pair(some_broker, federation, tmp_path, make_agent)
    yield made
    made.coordinator.stop()


def test_a_device_announces_trains_delivers_and_says_goodbye(
    broker: RunningBroker,
    federation: str,
    tmp_path: Path,
    bundle: Bundle,
    make_agent: Callable[..., AgentProcess],
) -> None:
    pair = Pair(broker, federation, tmp_path, make_agent)
    agent = pair.start(limits="idle_worker_s = 0.2\nmemory_bytes = 400_000_000")
    coordinator = pair.coordinator
    announced = coordinator.wait_for(ProfileAnnouncement)
    assert (announced.training_samples, announced.holdout_samples, announced.n_classes) == (48, 12, 3)
    assert announced.profile.planning_memory_bytes == 400_000_000
    first = coordinator.publish_task(bundle, "one", PLAN)
    coordinator.give(first)
    done = coordinator.wait_for(Done)
    heard = [type(message) for message in coordinator.heard if getattr(message, "task", None) == "one"]
    assert heard.index(Accepted) < heard.index(Done)
    update = coordinator.update_of(done, bundle)
    assert update["1.num_batches_tracked"] == 6
    assert np.abs(update["4.weight"]).max() > 0
    # The same again is answered with the same update, and the next round's task starts from a warm or a cold worker.
    after = len(coordinator.heard)
    coordinator.give(msgspec.structs.replace(first, deadline=0.0))
    assert coordinator.wait_for(Done, after=after) == done
    coordinator.give(coordinator.publish_task(bundle, "two", PLAN, round_=1))
    again = coordinator.wait_for(Done, lambda m: m.task == "two")
    coordinator.update_of(again, bundle)
    wait_until(lambda: not agent.workers(), "the idle worker to go")
    maps = Path(f"/proc/{agent.pid}/maps").read_text()
    assert not [line for line in maps.splitlines() if "numpy" in line or "onnxruntime" in line or "PIL" in line]
    after = len(coordinator.heard)
    assert agent.end() == 0
    assert not coordinator.wait_for(Status, lambda m: not m.online, after=after).online
    coordinator.stop()


def test_a_closed_run_clears_the_spool(pair: Pair, bundle: Bundle) -> None:
    agent = pair.start()
    coordinator = pair.coordinator
    coordinator.give(coordinator.publish_task(bundle, "one", PLAN))
    coordinator.wait_for(Done)
    coordinator.give(Close(run="run-1"))
    folders = [agent.directory / "spool" / name for name in ("blobs", "rebuilt", "residuals")]
    wait_until(lambda: not any([*folder.iterdir()] for folder in folders), "blobs, weights and residuals to go")
    wait_until(lambda: not agent.workers(), "the worker to go")


@pytest.mark.parametrize("moment", ["fetching", "training", "uploading"])
def test_a_killed_agent_goes_on_where_it_was(pair: Pair, bundle: Bundle, moment: str) -> None:
    limits = slow(bundle, 0.1)
    agent = pair.start(limits=limits)
    coordinator = pair.coordinator
    task = coordinator.publish_task(bundle, "one", PLAN)
    coordinator.give(task)
    if moment == "fetching":
        coordinator.wait_for(Progress, lambda m: m.state == "fetching")
    elif moment == "training":
        coordinator.wait_for(Progress, lambda m: m.state == "training")
    else:
        first = coordinator.wait_for(Done)
    workers = agent.workers()
    after = len(coordinator.heard)
    agent.end(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers to die with the agent")
    agent.start()
    done = coordinator.wait_for(Done, after=after)
    if moment == "uploading":
        assert done == first
    assert coordinator.update_of(done, bundle)["1.num_batches_tracked"] == 6
    assert agent.end() == 0
    assert Spool(agent.directory / "spool", max_blob_bytes=2**30).load_state().task == task


def test_a_killed_worker_costs_the_task_and_not_the_agent_and_log_and_metrics_say_so(
    pair: Pair, bundle: Bundle
) -> None:
    agent = pair.stopped(limits=f'{slow(bundle, 0.1)}\n[metrics]\naddress = "0"').start("--log-format", "json")
    coordinator = pair.coordinator
    coordinator.wait_for(ProfileAnnouncement)
    coordinator.give(coordinator.publish_task(bundle, "one", msgspec.structs.replace(PLAN, local_epochs=100)))
    coordinator.wait_for(Progress, lambda m: m.state == "training")
    (worker,) = agent.workers()
    os.kill(worker, signal.SIGKILL)
    failed = coordinator.wait_for(Failed)
    assert (failed.task, failed.kind) == ("one", "crashed")
    coordinator.give(coordinator.publish_task(bundle, "two", PLAN, round_=1))
    assert coordinator.wait_for(Done).task == "two"
    lines = [json.loads(line) for line in agent.log_file.read_text().splitlines()]
    (told,) = [line for line in lines if "failed (crashed)" in line["message"]]
    assert (told["level"], told["task"], told["round"]) == ("WARNING", "one", 0)
    assert all(line["device"].endswith("-dev") for line in lines)
    (url,) = [line["message"].partition(": ")[2] for line in lines if line["message"].startswith("metrics: ")]
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310  a page of our own child
        page = answer.read().decode()
    for series in ('tasks_total{kind="crashed",outcome="failed"} 1.0', "connected 1.0", 'phase{phase="uploading"} 1.0'):
        assert f"reft_edge_agent_{series}\n" in page


def test_a_newer_task_replaces_one_in_training(pair: Pair, bundle: Bundle) -> None:
    pair.start(limits=slow(bundle, 0.1))
    coordinator = pair.coordinator
    coordinator.give(coordinator.publish_task(bundle, "old", msgspec.structs.replace(PLAN, local_epochs=1000)))
    coordinator.wait_for(Progress, lambda m: m.state == "training")
    coordinator.give(coordinator.publish_task(bundle, "new", PLAN, round_=1))
    assert coordinator.wait_for(Done).task == "new"
    assert not [m for m in coordinator.heard if isinstance(m, Failed)]


def test_a_model_that_claims_to_fit_and_does_not_costs_the_task(
    pair: Pair, bundle: Bundle, heavy_bundle: Bundle
) -> None:
    agent = pair.start(limits=f"memory_bytes = {120 * 2**20}")
    coordinator = pair.coordinator
    coordinator.give(coordinator.publish_task(heavy_bundle, "one", PLAN))
    failed = coordinator.wait_for(Failed)
    assert (failed.kind, "grants 120 MiB" in failed.reason) == ("out_of_memory", True)
    coordinator.give(coordinator.publish_task(bundle, "two", PLAN, round_=1))
    assert coordinator.wait_for(Done).task == "two"
    assert agent.end() == 0


@pytest.mark.parametrize(
    ("change", "limits", "classes", "message"),
    [
        ({"memory_per_sample_bytes": 2**30}, "", (), "MiB"),
        ({}, "max_model_bytes = 1024", (), "max_model_bytes"),
        ({}, "", ("a", "b"), "3 classes"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    pair: Pair, bundle: Bundle, change: dict[str, int], limits: str, classes: tuple[str, ...], message: str
) -> None:
    pair.start(limits=limits)
    cost = msgspec.structs.replace(bundle.manifest.cost, **change)
    coordinator = pair.coordinator
    other = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, cost=cost))
    coordinator.give(coordinator.publish_task(other, "one", PLAN, classes=classes))
    assert message in coordinator.wait_for(Refused).reason


def test_a_manifest_that_is_none_is_refused_and_garbage_is_ignored(pair: Pair, bundle: Bundle) -> None:
    pair.start()
    coordinator = pair.coordinator
    coordinator.link.publish(coordinator._topic("task"), b"\xff no json", retain=True)
    coordinator.link.publish(coordinator._topic("down"), b"\xb7R garbage", qos=0)
    task = coordinator.publish_task(bundle, "one", PLAN)
    coordinator.give(msgspec.structs.replace(task, bundle=coordinator.store.put(b'{"model": 1}')))
    assert "manifest is not valid" in coordinator.wait_for(Refused).reason


def test_an_agent_survives_its_brokers_death_in_training(
    own_broker: RunningBroker,
    federation: str,
    tmp_path: Path,
    bundle: Bundle,
    make_agent: Callable[..., AgentProcess],
) -> None:
    pair = Pair(own_broker, federation, tmp_path, make_agent)
    agent = pair.start(limits=slow(bundle, 0.1))
    coordinator = pair.coordinator
    task = coordinator.publish_task(bundle, "one", PLAN)
    coordinator.give(task)
    coordinator.wait_for(Progress, lambda m: m.state == "training")
    own_broker.kill()
    after = len(coordinator.heard)
    own_broker.start()
    done = coordinator.wait_for(Done, after=after)
    coordinator.update_of(done, bundle)
    assert agent.end() == 0
    coordinator.stop()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that is taken and that nobody listens at."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.parametrize(
    ("data", "reachable", "code", "message"),
    [
        ('path = "nowhere"', True, 3, "nowhere does not exist"),
        ('pth = "data.npz"', True, 2, "did you mean 'path'"),
        ('path = "data.npz"', False, 7, "nobody listens at 127.0.0.1:"),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(
    some_broker: RunningBroker,
    silent_port: int,
    federation: str,
    make_agent: Callable[..., AgentProcess],
    data: str,
    reachable: bool,
    code: int,
    message: str,
) -> None:
    port = some_broker.port if reachable else silent_port
    settings = msgspec.structs.replace(some_broker.settings, connect_timeout_s=0.5 if not reachable else 10, port=port)
    agent = make_agent(settings, federation, data=data)
    for extra in ([], ["--check"]):
        agent.start(*extra)
        assert agent.process is not None
        assert agent.process.wait(TIMEOUT_S) == code
    log = agent.log_file.read_text()
    errors = [line for line in log.splitlines() if line.startswith("reft-edge agent: error:")]
    assert len(errors) == 2
    assert all(message in line for line in errors)
    assert "Traceback" not in log


def test_one_spool_serves_one_agent(pair: Pair) -> None:
    first = pair.start()
    second = AgentProcess(first.directory).start()
    assert second.process is not None
    assert second.process.wait(TIMEOUT_S) == 2
    assert "in use by another agent" in first.log_file.read_text()
