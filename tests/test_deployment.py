"""Deployments from `reft-edge deploy` to an answer over HTTP, with real processes, certificates and signatures.

How long it takes with twenty devices, and hundreds of faults: `scripts/benchmarks/deploy`.
"""

from __future__ import annotations

import http.client
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from reft_edge.coordinator.records import ExportRecord
from reft_edge.coordinator.settings import load_federation
from reft_edge.errors import FederationError
from reft_edge.simulation.deployments.breaking import break_deployment, left_over
from reft_edge.simulation.deployments.crew import Crew
from reft_edge.simulation.deployments.observer import Observer
from reft_edge.simulation.deployments.served import Watch, preinstall, slots_of
from reft_edge.simulation.deployments.site import FEDERATION, Site, SiteOptions, open_site
from reft_edge.simulation.deployments.stopping import settle, stop_bad
from reft_edge.simulation.deployments.swapping import PREDICT, read_version, serving
from reft_edge.simulation.deployments.versions import WHOLE, VersionOptions, make_versions
from reft_edge.simulation.digits import Digits, load_digits_split
from reft_edge.simulation.faults.words import Fault, Moment, Script
from reft_edge.simulation.run_directory import log_path
from reft_edge.wire.link_events import Event, Received
from reft_edge.wire.mqtt import MqttLink
from reft_edge.wire.topics import all_devices_filter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.mosquitto,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("mosquitto_program"),
]

OPTIONS = SiteOptions(devices=3, ratios=(WHOLE,), soak_s=0.5, absent_s=2.0)
FIRST, SECOND, THIRD = OPTIONS.names
WAIT_S = 60.0

Versions = Mapping[str, Sequence[ExportRecord]]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits_split(OPTIONS.devices, alpha=100.0, seed=0)


@pytest.fixture(scope="module")
def versions(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    wanted = {"random": VersionOptions(seed=3, epochs=0), "old": VersionOptions(seed=1, epochs=2)}
    wanted["new"] = VersionOptions(seed=2, epochs=2)
    return make_versions(tmp_path_factory.mktemp("versions"), wanted, digits, ratios=OPTIONS.ratios)


@contextmanager
def fleet(folder: Path, versions: Versions, digits: Digits, *, served: str = "") -> Iterator[tuple[Crew, Observer]]:
    """All agents are there, and serve a version already if one is `served`."""
    with ExitStack() as stack:
        site = stack.enter_context(open_site(folder / "site", OPTIONS, digits, versions))
        crew, observer = stack.enter_context(Crew(site)), stack.enter_context(Observer(site, blocks=True))
        for device in site.devices if served else ():
            preinstall(site, device, served, versions[served][0])
        crew.start_agents()
        observer.wait_for_devices(set(site.devices), timeout_s=WAIT_S)
        yield crew, observer


def everywhere(site: Site, version: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(site.devices, (version,))


def assert_served(crew: Crew, expected: Mapping[str, Sequence[str]]) -> None:
    """At once, or when the last have gone back; each file whole."""
    assert settle(crew, expected, Watch(crew.site)) == []
    assert crew.died() == []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(port: int, body: bytes) -> str:
    """The version that answers."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)) as connection:
        connection.request("POST", PREDICT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == http.HTTPStatus.OK
        return read_version(response.read())


class OldWords:
    """Keeps what the coordinator says to a device about deployments, and says it again, to the letter.

    It has the coordinator's certificate for the broker, but not the key that messages are signed with (which is the
    same one in this federation; nothing here signs).
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self.heard: list[Received] = []

    def listen(self) -> None:
        """What is retained at the broker now."""
        topic = all_devices_filter(FEDERATION, "deployment")
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        link = self._link(events, [(topic, 1)])
        while len(self.heard) < len(self._site.devices):
            event = events.get(timeout=WAIT_S)
            if isinstance(event, Received):
                self.heard.append(event)
        link.stop()

    def say_again(self) -> None:
        link = self._link(queue.SimpleQueue(), [])
        for event in self.heard:
            link.publish(event.topic, event.payload, qos=1, retain=True)
        link.stop()

    def _link(self, events: queue.SimpleQueue[Event], topics: list[tuple[str, int]]) -> MqttLink:
        broker = load_federation(self._site.settings_file).broker.resolved_in(self._site.directory)
        link = MqttLink(broker, client_id="coordinator", events=events, subscriptions=topics, persistent=False)
        link.start(wait_s=WAIT_S)
        return link


def test_a_version_is_deployed_answers_over_http_and_is_undone_and_an_old_order_changes_nothing(
    tmp_path: Path, versions: Versions, digits: Digits
) -> None:
    body = msgspec.json.encode({"inputs": digits.test.inputs[:2].tolist()})
    with fleet(tmp_path, versions, digits) as (crew, _):
        site = crew.site
        assert crew.deploy("old").status == 0
        assert_served(crew, everywhere(site, "old"))
        forger = OldWords(site)
        forger.listen()
        with serving(crew, FIRST) as port:
            assert ask(port, body) == "old"
            assert crew.deploy().status == 0  # the latest
            wait_until(lambda: ask(port, body) == "new")

            forger.say_again()
            for device in site.devices:
                log = log_path(site.directory, f"agent-{device}")
                wait_until(lambda log=log: "plays it again" in log.read_text())
            assert_served(crew, everywhere(site, "new"))
            assert ask(port, body) == "new"

            assert crew.roll_back().status == 0
            assert_served(crew, everywhere(site, "old"))
            wait_until(lambda: ask(port, body) == "old")
        wait_until(lambda: left_over(site) == [])


def test_a_bad_version_is_stopped_at_the_canary(tmp_path: Path, versions: Versions, digits: Digits) -> None:
    with fleet(tmp_path, versions, digits, served="old") as (crew, observer):
        stopped = stop_bad(crew, observer, "random", ["random"], version="random", served="old")
    assert (stopped.status, stopped.state) == (FederationError.exit_code, "rolled_back")
    assert (stopped.kind, stopped.canaries, stopped.switched, stopped.complaints) == ("accuracy", 1, 0, ())


def test_who_is_killed_or_away_takes_the_version_when_it_is_back_and_goes_back_where_its_disk_loses_it(
    tmp_path: Path, versions: Versions, digits: Digits
) -> None:
    with fleet(tmp_path, versions, digits, served="old") as (crew, observer):
        faults = (
            Fault(kind="kill-agent", moment=Moment(who="clock"), device=THIRD, pause_s=WAIT_S),  # until all is over
            Fault(kind="kill-agent", moment=Moment(who=FIRST, what="fetching"), device=FIRST, pause_s=0.2),
            Fault(kind="kill-agent", moment=Moment(who=SECOND, what="checking"), device=SECOND, pause_s=0.2),
        )
        survived = break_deployment(crew, observer, Script(seed=0, quorum=1.0, faults=faults), old="old", new="new")
        assert survived.complaints == ()
        assert (survived.state, survived.missed) == ("done", ())

        crew.agents[FIRST].kill()
        damaged = slots_of(crew.site, FIRST).current()
        assert damaged is not None
        content = bytearray(damaged.path.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.path.write_bytes(content)
        crew.agents[FIRST].start()
        assert_served(crew, everywhere(crew.site, "new") | {FIRST: ("old",)})
