"""Deployments as a device lives them: a real agent, worker and broker, killed and misled at chosen moments."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from reft_edge.agent.serving.predictor import Predictor
from reft_edge.agent.serving.slots import SERVING, Slots
from reft_edge.agent.spool import Spool
from reft_edge.bundle.bundle import Bundle
from reft_edge.errors import ModelError
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.wire.deployment import Condition, Deploy, HealthRules, PredictionCounts, Rollback
from reft_edge.wire.messages import Done, ProfileAnnouncement, Progress, TrainingPlan, encode
from reft_edge.wire.signing import seal
from reft_edge.wire.topics import device_topic
from tests.agent.conftest import AgentProcess
from tests.agent.coordinator_side import CoordinatorSide, wait_until
from tests.agent.serving.models import brightness_model, deployment, is_model, sha256_of, spoil
from tests.trusted import TrustedSite, signing_key

pytestmark = pytest.mark.usefixtures("data_file")

GOOD = brightness_model()
OTHER = brightness_model(wrong=0.01)
BAD = brightness_model(wrong=10)
SLOW = brightness_model(rounds=10**9)
"""Its check does not end."""


class Device:
    """An agent with a coordinator's side on one broker."""

    def __init__(self, coordinator: CoordinatorSide, directory: Path, make_agent: Callable[..., AgentProcess]) -> None:
        """`make_agent` takes what the fixture does, but for the broker and the federation."""
        self.coordinator = coordinator
        self._make = make_agent
        self.spool_folder = directory / "spool"
        self.slots = Slots(self.spool_folder / SERVING)

    def start(self, **options: str) -> AgentProcess:
        heard = len(self.coordinator.heard)
        agent: AgentProcess = self._make(**options).start()
        self.coordinator.wait_for(ProfileAnnouncement, after=heard)
        return agent

    def roll_out(self, deploy: Deploy, *, until: str = "serving") -> Condition:
        """Offer it, and wait until the device says `until` of it."""
        after = len(self.coordinator.heard)
        self.coordinator.roll_out(deploy)
        return self.wait_for(deploy.deployment, until, after=after)

    def undo(self, name: str, reason: str = "") -> Condition:
        after = len(self.coordinator.heard)
        self.coordinator.roll_out(Rollback(deployment=name, reason=reason))
        return self.wait_for(name, "rolled_back", after=after)

    def undo_served(self, name: str) -> None:
        """Undo what serves, while something else is under way: of that the device goes on to tell."""
        after = len(self.coordinator.heard)
        self.coordinator.roll_out(Rollback(deployment=name))
        self.coordinator.wait_for(Condition, lambda m: m.serving is None, after=after)

    def wait_for(self, name: str, state: str, *, after: int = 0) -> Condition:
        def is_it(condition: Condition) -> bool:
            attempt = condition.attempt
            return attempt is not None and (attempt.deployment, attempt.state) == (name, state)

        return self.coordinator.wait_for(Condition, is_it, after=after)

    def offer(self, name: str, *models: bytes, **other: Any) -> Deploy:
        return deployment(self.coordinator.store, name, *models, **other)

    def spool(self) -> Spool:
        return Spool(self.spool_folder, max_blob_bytes=2**30)


@pytest.fixture
def device(
    some_broker: RunningBroker, federation: str, tmp_path: Path, make_agent: Callable[..., AgentProcess]
) -> Iterator[Device]:
    coordinator = CoordinatorSide(some_broker.settings, federation, f"{federation}-dev", tmp_path)
    yield Device(coordinator, tmp_path, partial(make_agent, some_broker.settings, federation))
    coordinator.stop()


def errors_of(agent: AgentProcess) -> list[str]:
    lines = agent.log_file.read_text().splitlines()
    return [line for line in lines if " ERROR " in line or "Traceback" in line]


def test_what_passes_its_check_serves_and_what_is_undone_does_not(device: Device) -> None:
    agent = device.start()
    first = device.coordinator.wait_for(Condition)
    assert (first.serving, first.previous, first.attempt) == (None, None, None)
    offer = device.offer("one", GOOD, classes=("dark", "dim", "bright"))
    one = device.roll_out(offer)
    assert one.serving is not None
    assert one.serving.sha256 == sha256_of(GOOD)
    assert one.attempt is not None
    (health,) = one.attempt.health
    assert (health.precision, health.holdout_samples, health.metric, health.metric_before) == ("float32", 12, 1.0, None)
    assert 0 < health.latency_p50_s <= health.latency_p95_s <= health.latency_p99_s
    assert health.peak_memory_bytes > 2**24
    current = device.slots.current()
    assert is_model(current, GOOD)
    assert current is not None
    assert current.slot.classes == ("dark", "dim", "bright")
    again = device.roll_out(offer)
    assert again == msgspec.structs.replace(one, vitals=again.vitals)

    two = device.roll_out(device.offer("two", OTHER))
    assert two.attempt is not None
    assert two.attempt.health[0].metric_before == 1.0
    assert (two.previous, is_model(device.slots.current(), OTHER)) == (one.serving, True)
    wait_until(lambda: not [*device.spool().blobs.root.iterdir()], "the blobs to go")
    wait_until(lambda: not agent.workers(), "the worker to go")

    undone = device.undo("two", "a canary failed")
    assert (undone.serving, undone.previous) == (one.serving, None)
    assert undone.attempt is not None
    assert undone.attempt.reason == "a canary failed"
    assert device.undo("one").serving is None
    states = [m.attempt.state for m in device.coordinator.heard if isinstance(m, Condition) and m.attempt]
    course = ["fetching", "checking", "serving"]
    assert states == [*course, "serving", *course, "rolled_back", "rolled_back"]
    maps = Path(f"/proc/{agent.pid}/maps").read_text()
    assert not [line for line in maps.splitlines() if "numpy" in line or "onnxruntime" in line]
    assert agent.end() == 0
    assert errors_of(agent) == []


def test_what_does_not_pass_is_told_with_figures_and_the_old_one_stays(device: Device) -> None:
    agent = device.start(limits="max_model_bytes = 1_000_000")
    before = device.roll_out(device.offer("one", GOOD))
    for number, (state, kind, words, offer) in enumerate(
        [
            (
                "refused",
                "accuracy",
                "accuracy 0.333 on 12 held out samples, 1 of what is served now; max_metric_drop is 0.05",
                device.offer("d0", BAD),
            ),
            (
                "refused",
                "latency",
                "max_latency_s is 1e-09",
                device.offer("d1", GOOD, rules=HealthRules(max_latency_s=1e-9)),
            ),
            ("failed", "bundle", "cannot be used", device.offer("d2", b"\x08\x08 no model")),
            (
                "refused",
                "memory",
                "the model has 1000001 bytes, [limits] max_model_bytes",
                device.offer("d3", bytes(1_000_001)),
            ),
        ]
    ):
        answer = device.roll_out(offer, until=state)
        assert answer.attempt is not None
        assert (answer.attempt.kind, words in answer.attempt.reason) == (kind, True), answer.attempt.reason
        assert "/" not in answer.attempt.reason
        assert f"deployment {offer.deployment}: {state} (global): {answer.attempt.reason}" in agent.log_file.read_text()
        assert (answer.serving, is_model(device.slots.current(), GOOD)) == (before.serving, True)
        assert device.roll_out(offer, until=state).attempt == answer.attempt, number
    # After a refusal the same deployment may come with the next smaller model.
    smaller = device.roll_out(device.offer("d0", OTHER, model="variant-0.50"))
    assert smaller.serving is not None
    assert smaller.serving.model == "variant-0.50"

    agent.end(signal.SIGKILL)
    spoil(device.slots.current().path)  # type: ignore[union-attr]
    after = len(device.coordinator.heard)
    agent.start()
    told = device.wait_for("d0", "failed", after=after)
    assert told.serving == before.serving
    assert told.attempt is not None
    assert told.attempt.reason.endswith("is damaged on disk and was removed; serving version-one")
    assert (told.attempt.reason.startswith("slot "), str(device.spool_folder) in told.attempt.reason) == (True, False)
    assert len(errors_of(agent)) == 1
    assert agent.end() == 0


def test_what_fails_after_a_switch_is_told_at_once(device: Device) -> None:
    """Also where the owner allows no report, and one would be due tomorrow."""
    agent = device.start(serving="report_every_s = 86400")
    device.roll_out(device.offer("one", GOOD))
    with Predictor(device.spool_folder) as predictor, pytest.raises(ModelError):
        predictor.predict(np.full((1, 1, 6, 6), 3e38, np.float32))
    told = device.coordinator.wait_for(Condition, lambda m: m.counts is not None)
    assert told.counts == PredictionCounts(version="version-one", errors=1)
    assert agent.end() == 0


@pytest.mark.parametrize("moment", ["fetching", "checking"])
def test_a_killed_agent_ends_where_it_should(device: Device, moment: str) -> None:
    agent = device.start()
    device.coordinator.roll_out(device.offer("one", GOOD))
    device.wait_for("one", moment)
    workers = agent.workers()
    agent.end(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the worker to die with the agent")
    after = len(device.coordinator.heard)
    agent.start()
    served = device.wait_for("one", "serving", after=after)
    assert served.serving is not None
    assert is_model(device.slots.current(), GOOD)
    assert agent.end() == 0


def test_what_is_undone_while_the_device_is_away_is_undone_when_it_comes_back(device: Device) -> None:
    agent = device.start()
    device.roll_out(device.offer("one", GOOD))
    agent.end(signal.SIGKILL)
    after = len(device.coordinator.heard)
    device.coordinator.roll_out(Rollback(deployment="one"))
    agent.start()
    assert device.wait_for("one", "rolled_back", after=after).serving is None
    assert device.slots.current() is None
    assert agent.end() == 0


def test_what_hangs_in_its_check_is_replaced_undone_or_given_up_at_once(device: Device) -> None:
    agent = device.start()
    before = device.roll_out(device.offer("one", GOOD))

    def check_begins(name: str) -> int:
        """Returns the worker's process id."""
        device.roll_out(device.offer(name, SLOW), until="checking")
        wait_until(lambda: device.spool().load_deployment().attempts == 1, "its check to begin")
        wait_until(lambda: len(agent.workers()) == 1, "its worker")
        return agent.workers()[0]

    check_begins("two")
    assert device.undo("two").serving == before.serving
    wait_until(lambda: not agent.workers(), "the worker to go")
    worker = check_begins("three")
    device.undo_served("one")  # while another is checked
    assert agent.workers() == [worker]
    after = len(device.coordinator.heard)
    device.roll_out(device.offer("four", OTHER))
    assert worker not in agent.workers()
    os.kill(check_begins("five"), signal.SIGKILL)
    died = device.wait_for("five", "failed", after=after)
    assert died.attempt is not None
    assert (died.attempt.kind, "died of SIGKILL" in died.attempt.reason) == ("crashed", True)
    assert is_model(device.slots.current(), OTHER)
    check_begins("six")
    assert agent.end() == 0  # at once, and the check does not count as one that took the device down
    state = device.spool().load_deployment()
    assert (state.stage.value, state.attempts) == ("checking", 0)


def test_training_is_not_disturbed_and_a_roll_back_does_not_wait_for_it(device: Device, bundle: Bundle) -> None:
    step_s = 0.05
    agent = device.start(limits=f"training_flops_per_s = {bundle.manifest.cost.step_flops(16) / step_s}")
    coordinator = device.coordinator
    device.roll_out(device.offer("one", GOOD))
    plan = TrainingPlan(local_epochs=12, batch_size=16, learning_rate=0.1, seed=11)
    task = coordinator.publish_task(bundle, "task", plan)
    coordinator.give(task)
    coordinator.wait_for(Progress, lambda m: m.state == "training")
    after = len(coordinator.heard)
    two = device.offer("two", OTHER)
    device.roll_out(two, until="checking")  # in line behind the training
    spoil(device.spool().blobs.path(two.files[0].blob.sha256))  # and so it is fetched twice
    device.undo_served("one")
    assert not [m for m in coordinator.heard[after:] if isinstance(m, Done)]
    served = device.wait_for("two", "serving", after=after)
    done = coordinator.wait_for(Done, after=after)
    assert coordinator.heard.index(done) < coordinator.heard.index(served)
    assert coordinator.update_of(done, bundle)["1.num_batches_tracked"] == 36
    assert is_model(device.slots.current(), OTHER)
    assert agent.log_file.read_text().count("damaged on disk") == 1
    assert agent.end() == 0
    assert errors_of(agent) == []


def test_only_new_words_of_the_enrolled_coordinator_change_what_is_served(
    some_broker: RunningBroker, federation: str, tmp_path: Path, make_agent: Callable[..., AgentProcess]
) -> None:
    site = TrustedSite(tmp_path / "keys")
    name = f"{federation}-dev"
    topic = device_topic(federation, name, "deployment")
    key, foreign = site.coordinator_key, signing_key(site.device("somebody"))
    device_key = signing_key(site.device(name)).public  # every condition is checked with it
    coordinator = CoordinatorSide(some_broker.settings, federation, name, tmp_path, key=key, device_key=device_key)
    device = Device(coordinator, tmp_path, partial(make_agent, some_broker.settings, federation))
    agent = device.start(trust=site.agent_table(name))

    def dropped(words: str) -> int:
        return sum("dropped: it" in line and words in line for line in agent.log_file.read_text().splitlines())

    one, two = device.offer("one", GOOD, sequence=10), device.offer("two", OTHER, sequence=20)
    forged = encode(msgspec.structs.replace(two, sequence=2**50))
    coordinator.publish(forged, "deployment", retain=False)
    coordinator.publish(seal(topic, forged, foreign), "deployment", retain=False)
    coordinator.publish(seal(device_topic(federation, "other", "deployment"), forged, key), "deployment", retain=False)
    coordinator.publish(seal(topic, encode(Rollback(deployment="one")), foreign), "deployment", retain=False)
    wait_until(lambda: dropped("is not signed") == 1 and dropped("not by the key") == 3, "forged words to be dropped")
    device.roll_out(one)
    device.roll_out(two)
    coordinator.roll_out(one)
    wait_until(lambda: dropped("its sequence is 10, and 20 was obeyed") == 1, "an old offer to be dropped")
    coordinator.roll_out(Rollback(deployment="two", sequence=30))
    assert device.wait_for("two", "rolled_back").serving is not None
    coordinator.roll_out(two)  # retained: a restart is met by it as well
    wait_until(lambda: dropped("its sequence is 20, and 30 was obeyed") == 1, "an old offer to be dropped")
    agent.end(signal.SIGKILL)
    agent.start()
    wait_until(lambda: dropped("its sequence is 20, and 30 was obeyed") == 2, "an old offer to be dropped")
    assert is_model(device.slots.current(), GOOD)
    assert agent.end() == 0
    coordinator.stop()
