"""The agent with [trust], as a real process: what others say in the coordinator's name changes nothing."""

from __future__ import annotations

import getpass
import queue
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from reft_edge.agent.spool import Spool
from reft_edge.bundle.bundle import Bundle
from reft_edge.errors import BrokerError
from reft_edge.simulation.brokers import RunningBroker
from reft_edge.wire.messages import (
    Close,
    Done,
    ProfileAnnouncement,
    Progress,
    Refused,
    Task,
    TrainingPlan,
    encode,
)
from reft_edge.wire.mqtt import BrokerSettings, MqttLink
from reft_edge.wire.signing import seal
from reft_edge.wire.topics import device_topic
from tests.agent.conftest import AgentProcess
from tests.agent.coordinator_side import TIMEOUT_S, CoordinatorSide, wait_until
from tests.certificates import DAY, Authority
from tests.trusted import TrustedSite, signing_key

PLAN = TrainingPlan(local_epochs=1, batch_size=16, learning_rate=0.1, seed=11)

pytestmark = pytest.mark.usefixtures("data_file")


@pytest.fixture
def site(tmp_path: Path) -> TrustedSite:
    return TrustedSite(tmp_path / "keys")


def numbered(task: Task, sequence: int, name: str | None = None) -> Task:
    return msgspec.structs.replace(task, sequence=sequence, task=name or task.task)


def warnings_of(agent: AgentProcess, words: str) -> int:
    return sum(words in line for line in agent.log_file.read_text().splitlines())


def test_only_new_words_of_the_enrolled_coordinator_are_obeyed(
    some_broker: RunningBroker,
    federation: str,
    tmp_path: Path,
    bundle: Bundle,
    make_agent: Callable[..., AgentProcess],
    site: TrustedSite,
) -> None:
    name = f"{federation}-dev"
    topic = device_topic(federation, name, "task")
    device = signing_key(site.device(name))
    key, foreign = site.coordinator_key, signing_key(site.device("somebody"))
    coordinator = CoordinatorSide(some_broker.settings, federation, name, tmp_path, key=key, device_key=device.public)
    agent = make_agent(some_broker.settings, federation, trust=site.agent_table(name)).start()

    coordinator.wait_for(ProfileAnnouncement)  # was checked with the device's key
    assert coordinator.certificates == [site.device(name).certificate_pem.decode()]
    one = numbered(coordinator.publish_task(bundle, "one", PLAN), 10)
    other = f"{federation}-other"
    forged = encode(numbered(one, 2**50, "forged"))
    coordinator.publish(forged, retain=False)
    coordinator.publish(seal(topic, forged, foreign), retain=False)
    coordinator.publish(seal(device_topic(federation, other, "task"), forged, key), retain=False)
    coordinator.publish(encode(Close(run="run-1", sequence=2**50)), retain=False)
    wait_until(lambda: warnings_of(agent, "dropped: it") == 4, "the forged ones to be refused")
    assert warnings_of(agent, "it is not signed") == 2
    assert warnings_of(agent, "its signature is not by the key") == 2

    coordinator.give(one)
    done = coordinator.wait_for(Done)
    coordinator.give(one)  # delivered twice
    assert coordinator.wait_for(Done, after=coordinator.heard.index(done) + 1) == done
    coordinator.update_of(done, bundle)
    coordinator.give(numbered(one, 9, "zero"))
    wait_until(lambda: warnings_of(agent, "its sequence is 9, and 10 was obeyed") == 1, "a replay")

    coordinator.give(Close(run="run-1", sequence=11))
    spool = Spool(agent.directory / "spool", max_blob_bytes=2**30)
    wait_until(lambda: spool.load_state().task is None, "the run to be closed")
    coordinator.give(one)
    wait_until(lambda: warnings_of(agent, "its sequence is 10, and 11 was obeyed") == 1, "an old task")
    closed = spool.load_state()
    assert closed.mark is not None
    assert (closed.mark.sequence, closed.mark.signer) == (11, key.public.fingerprint)

    # The old task is still retained: a restart is met by it.
    agent.end(signal.SIGKILL)
    heard = len(coordinator.heard)
    agent.start()
    coordinator.wait_for(ProfileAnnouncement, after=heard)
    wait_until(lambda: warnings_of(agent, "its sequence is 10, and 11 was obeyed") == 2, "an old task")
    coordinator.give(numbered(one, 12, "two"))
    coordinator.wait_for(Done, lambda m: m.task == "two")
    coordinator.give(Close(run="run-1", sequence=11))
    wait_until(lambda: warnings_of(agent, "its sequence is 11, and 12 was obeyed") == 1, "an old Close")
    assert spool.load_state().task == numbered(one, 12, "two")
    assert not [m for m in coordinator.heard if getattr(m, "task", None) in ("forged", "zero")]

    # With another coordinator's key, what this one left is not obeyed, and the other's count begins anew.
    successor = TrustedSite(tmp_path / "successor")
    assert agent.end() == 0
    site.coordinator_key_file.write_bytes(successor.coordinator_key_file.read_bytes())
    agent.start()
    wait_until(lambda: warnings_of(agent, "not signed by the enrolled coordinator; forgetting it") == 1, "forgetting")
    refusing = msgspec.structs.replace(numbered(one, 1, "three"), classes=("a", "b"))
    coordinator.publish(seal(topic, encode(refusing), successor.coordinator_key))
    assert coordinator.wait_for(Refused).task == "three"
    assert agent.end() == 0
    coordinator.stop()


def test_an_agent_without_trust_obeys_a_coordinator_that_signs(
    some_broker: RunningBroker,
    federation: str,
    tmp_path: Path,
    bundle: Bundle,
    make_agent: Callable[..., AgentProcess],
    site: TrustedSite,
) -> None:
    coordinator = CoordinatorSide(
        some_broker.settings, federation, f"{federation}-dev", tmp_path, key=site.coordinator_key
    )
    agent = make_agent(some_broker.settings, federation).start()
    coordinator.wait_for(ProfileAnnouncement)
    coordinator.give(numbered(coordinator.publish_task(bundle, "one", PLAN), 10))
    coordinator.wait_for(Progress)
    assert warnings_of(agent, "no [trust]") == 0  # the broker is on this machine
    assert agent.end() == 0
    coordinator.stop()


# With a broker that looks at certificates

CONFIGURATION = """\
user {user}
listener {port} 127.0.0.1
allow_anonymous true
cafile {directory}/ca.crt
certfile {directory}/server.crt
keyfile {directory}/server.key
crlfile {directory}/ca.crl
require_certificate true
"""


@pytest.fixture
def tls(site: TrustedSite, mosquitto_program: str) -> Iterator[tuple[BrokerSettings, Callable[[], None]]]:
    """Settings for the coordinator, and what restarts the broker."""
    directory = site.authority.directory
    site.authority.issue_server()
    site.authority.revoke()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (directory / "mosquitto.conf").write_text(
        CONFIGURATION.format(user=getpass.getuser(), port=port, directory=directory)
    )
    settings = BrokerSettings(
        port=port,
        ca_file=str(site.authority.ca_file),
        certificate_file=str(site.coordinator.certificate_file),
        key_file=str(site.coordinator.key_file),
    )
    running: list[subprocess.Popen[bytes]] = []

    def restart() -> None:
        for broker in running:
            broker.kill()
            broker.wait()
        command = [mosquitto_program, "-c", str(directory / "mosquitto.conf")]
        running[:] = [subprocess.Popen(command, stderr=subprocess.DEVNULL)]
        probe = MqttLink(settings, client_id="probe", events=queue.SimpleQueue(), persistent=False)
        probe.start(wait_s=TIMEOUT_S)
        probe.stop()

    restart()
    yield settings, restart
    for broker in running:
        broker.kill()
        broker.wait()


@pytest.mark.mosquitto
def test_a_renewed_certificate_is_announced_and_a_refusal_explained(
    tls: tuple[BrokerSettings, Callable[[], None]],
    federation: str,
    tmp_path: Path,
    make_agent: Callable[..., AgentProcess],
    site: TrustedSite,
) -> None:
    settings, restart_broker = tls
    name = f"{federation}-dev"
    device = site.device(name)

    def agent_with(certificate: Path) -> AgentProcess:
        files = f'certificate_file = "{certificate}"\nkey_file = "{device.key_file}"\n'
        files += f'ca_file = "{settings.ca_file}"\n'
        return make_agent(settings, federation, trust=site.agent_table(name), broker_files=files)

    foreign = Authority(tmp_path / "foreign").issue(name, key=device.key)
    lost = agent_with(foreign.certificate_file).start()
    assert lost.process is not None
    assert lost.process.wait(TIMEOUT_S) == BrokerError.exit_code
    assert warnings_of(lost, f"{foreign.certificate_file}: it was signed by another authority") == 1

    agent = agent_with(device.certificate_file)
    coordinator = CoordinatorSide(
        settings, federation, name, tmp_path, key=site.coordinator_key, device_key=signing_key(device).public
    )
    agent.start()
    coordinator.wait_for(ProfileAnnouncement)
    wait_until(lambda: warnings_of(agent, " ends on ") == 1, "a warning that it ends within a month")

    renewed = site.authority.issue(name, key=device.key, ends=2 * DAY, file_name="renewed")
    heard = len(coordinator.heard)
    coordinator.publish(renewed.certificate_pem, "certificate")
    coordinator.wait_for(ProfileAnnouncement, after=heard)
    assert coordinator.certificates[-1] == device.certificate_file.read_text() == renewed.certificate_pem.decode()

    site.authority.revoke(renewed)
    restart_broker()
    wait_until(lambda: warnings_of(agent, "revoked") > 0, "the refusal to be explained")
    assert agent.process is not None
    assert agent.process.poll() is None
    site.authority.revoke()
    restart_broker()
    heard = len(coordinator.heard)
    coordinator.wait_for(ProfileAnnouncement, after=heard)
    assert agent.end() == 0
    coordinator.stop()
