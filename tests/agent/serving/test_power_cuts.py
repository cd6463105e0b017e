"""A whole deployment and its undoing, with power failing before each single change on the disk.

Everything is the agent's own but the network and the worker process: blobs are there when they are asked for, and what
is checked passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.agent.jobs import Job, Jobs
from reft_edge.agent.protocol import CheckModel
from reft_edge.agent.serving.deployment_words import CheckPassed, Stage
from reft_edge.agent.serving.deployments import Deployments
from reft_edge.agent.serving.slots import SERVING, InstalledModel, Slot, Slots
from reft_edge.agent.session_words import BlobFetched, Fetch, Mark
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import Spool
from reft_edge.data.settings import DataSettings
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.deployment import Condition, Deploy, DeploymentMessage, Rollback
from tests.agent.serving.failing_disk import FailingDisk
from tests.agent.serving.models import deployment, sha256_of

SETTINGS = AgentSettings(device="dev", federation="f", data=DataSettings(path="data"))


def content(name: str) -> bytes:
    return f"the model {name} ".encode() * 20


class CheckLine(Jobs):
    """A line of jobs whose worker is the test."""

    def __init__(self) -> None:
        self.line: list[CheckModel] = []

    def add(self, job: Job) -> None:
        assert isinstance(job, CheckModel)
        self.line.append(job)

    def cancel_check(self, now: float) -> None:  # noqa: ARG002
        self.line.clear()


class Device:
    """One life of an agent, from start to power cut."""

    def __init__(self, root: Path) -> None:
        self.spool = Spool(root / "spool", max_blob_bytes=2**30)
        self.slots = Slots(self.spool.root / SERVING)
        self.jobs = CheckLine()
        self.told: list[Condition] = []
        self.deployments = Deployments(
            SETTINGS, self.spool, self.jobs, fetch=self.fetch, sweep=lambda: None, say=self.told.append
        )

    def live(self, *messages: DeploymentMessage) -> None:
        """Start, go on with what was begun, hear the messages and do all that follows."""
        self.deployments.start(signer=None)
        self.deployments.resume()
        self.deployments.connected(0.0)
        self.work()
        for message in messages:
            self.deployments.obey(message, Mark(signer="us", sequence=message.sequence))
            self.work()

    def fetch(self, action: Fetch) -> None:
        self.deployments.feed(BlobFetched(sha256=action.ref.sha256))

    def work(self) -> None:
        while self.jobs.line:
            job = self.jobs.line.pop(0)
            self.deployments.job_begins(job)
            offer = job.deploy
            self.slots.install(slot_of(offer), content(offer.deployment))
            self.deployments.feed(CheckPassed(deployment=offer.deployment, model=offer.model, health=()))

    @property
    def serves(self) -> str | None:
        return name_of(self.slots.current())


def slot_of(offer: Deploy) -> Slot:
    data = content(offer.deployment)
    return Slot(
        version=offer.version,
        deployment=offer.deployment,
        model=offer.model,
        precision="float32",
        sha256=sha256_of(data),
        size_bytes=len(data),
    )


def name_of(model: InstalledModel | None) -> str | None:
    if model is None:
        return None
    assert model.verified()
    return model.slot.deployment


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sync is good for is simulated (`failing_disk`), and a busy disk takes its time for each."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def offer(tmp_path: Path) -> Callable[..., Deploy]:
    store = BlobStore(tmp_path / "coordinator")
    return lambda name, sequence: deployment(store, name, content(name), sequence=sequence)


def test_what_was_undone_is_not_returned_to(tmp_path: Path, offer: Callable[..., Deploy]) -> None:
    """Also where it was no more than what the device would have returned to."""
    device = Device(tmp_path)
    device.live(offer("one", 10), offer("two", 20), Rollback(deployment="one", sequence=30))
    assert (device.serves, device.slots.previous()) == ("two", None)
    told = device.told[-1]
    assert (told.attempt and told.attempt.state, told.previous) == ("rolled_back", None)
    device.live(Rollback(deployment="two", sequence=40))
    assert device.serves is None


@pytest.mark.parametrize("worst", [True, False], ids=["what was not synced is lost", "all is kept"])
@pytest.mark.parametrize(
    ("said_last", "before", "after"),
    [
        ("deploy", "one", "two"),
        ("undo", "one", None),
        ("deploy and undo", "one", "one"),
        ("undo the one before", "two", "two"),
    ],
)
def test_power_may_fail_at_any_moment_and_the_last_word_is_obeyed_in_the_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offer: Callable[..., Deploy],
    worst: bool,
    said_last: str,
    before: str,
    after: str | None,
) -> None:
    one, two = offer("one", 10), offer("two", 20)
    messages: dict[str, tuple[DeploymentMessage, ...]] = {
        "deploy": (two,),
        "undo": (Rollback(deployment="one", sequence=20),),
        "deploy and undo": (two, Rollback(deployment="two", sequence=30)),
        "undo the one before": (Rollback(deployment="one", sequence=30),),
    }
    words = messages[said_last]
    n_changes, at = None, 0
    while n_changes is None or at <= n_changes:
        root = tmp_path / str(at)
        Device(root).live(*(one, two)[: 2 if before == "two" else 1])
        disk = FailingDisk(root, monkeypatch)
        with disk.failing(at):
            Device(root).live(*words)
            n_changes = disk.n_changes
        if worst:
            disk.lose_power()
        allowed = {before, after, "two"} if said_last == "deploy and undo" else {before, after}
        assert name_of(Slots(root / "spool" / SERVING).current()) in allowed
        survivor = Device(root)
        survivor.live(words[-1])  # it is retained
        assert survivor.serves == after
        assert name_of(survivor.slots.previous()) == ("one" if said_last == "deploy" else None)
        assert survivor.told[-1].attempt is not None
        assert survivor.told[-1].attempt.state == ("serving" if said_last == "deploy" else "rolled_back")
        assert survivor.spool.load_deployment().stage is Stage.SETTLED
        assert survivor.spool.load_deployment().mark == Mark(signer="us", sequence=words[-1].sequence)
        at += 1
    assert n_changes > 5
