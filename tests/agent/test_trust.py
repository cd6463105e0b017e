"""Whom the agent obeys: checks of tasks, replays, and its key files."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from reft_edge.agent.session import Session
from reft_edge.agent.session_words import Mark, RunClosed, SessionState, TaskArrived
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import Spool
from reft_edge.agent.trust import open_deployment, open_task, read_identity
from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.deployment import Deploy, ModelFile, Rollback
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.messages import Close, Task, encode
from reft_edge.wire.signing import SigningKey, seal
from tests.agent.test_session import task
from tests.trusted import TrustedSite, signing_key

TOPIC = "reft/v1/f/device/d/task"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> TrustedSite:
    return TrustedSite(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def key(site: TrustedSite) -> SigningKey:
    return site.coordinator_key


def numbered(sequence: int, name: str = "t1") -> Task:
    return msgspec.structs.replace(task(name), sequence=sequence)


def opened(message: Task | Close, key: SigningKey | None, mark: Mark | None = None) -> Mark:
    """The mark to keep, of a message that is signed and checked with a key, or neither."""
    coordinator = None if key is None else key.public
    received, after = open_task(TOPIC, seal(TOPIC, encode(message), key), coordinator=coordinator, mark=mark)
    assert received == message
    return after


def test_a_mark_rises_with_what_is_obeyed_and_a_lower_sequence_is_refused(key: SigningKey) -> None:
    mark = opened(numbered(7), key)
    assert mark == Mark(signer=key.public.fingerprint, sequence=7)
    assert opened(numbered(7), key, mark) == mark  # a repeated delivery
    mark = opened(Close(run="r", sequence=9), key, mark)
    for old in (numbered(7), numbered(8, "t2"), Close(run="q", sequence=8)):
        with pytest.raises(RemoteProtocolError, match="and 9 was obeyed"):
            opened(old, key, mark)


def test_another_coordinator_counts_anew(site: TrustedSite, key: SigningKey) -> None:
    other = signing_key(site.device("other-coordinator"))
    mark = opened(numbered(1000), key)
    assert opened(numbered(3), other, mark).sequence == 3


def test_what_the_enrolled_coordinator_did_not_sign_for_this_device_is_refused(
    site: TrustedSite, key: SigningKey
) -> None:
    message = encode(numbered(1))
    foreign = signing_key(site.device("d"))
    elsewhere = TOPIC.replace("/d/", "/e/")
    for payload in (message, seal(TOPIC, message, foreign), seal(elsewhere, message, key)):
        with pytest.raises(RemoteProtocolError, match="sign"):
            open_task(TOPIC, payload, coordinator=key.public, mark=None)


def test_without_an_enrolled_key_signed_and_unsigned_tasks_are_taken(key: SigningKey) -> None:
    message = numbered(1)
    for payload in (encode(message), seal(TOPIC, encode(message), key)):
        assert open_task(TOPIC, payload, coordinator=None, mark=None)[0] == message


def test_an_unsigned_message_older_than_the_last_one_of_its_run_is_refused() -> None:
    mark = opened(Close(run="a", sequence=7), None)
    assert opened(Close(run="a", sequence=7), None, mark) == mark
    with pytest.raises(RemoteProtocolError, match="its sequence is 6, and 7 was obeyed"):
        opened(Close(run="a", sequence=6), None, mark)


def test_another_unsigned_run_counts_anew() -> None:
    mark = opened(Close(run="a", sequence=7), None)
    assert opened(Close(run="b", sequence=1), None, mark).sequence == 1


def test_an_unsigned_mark_does_not_count_against_the_enrolled_coordinator(key: SigningKey) -> None:
    mark = opened(Close(run="a", sequence=2**50), None)
    assert opened(numbered(3), key, mark).sequence == 3


def test_the_mark_outlives_tasks_runs_and_restarts(tmp_path: Path) -> None:
    first, last = Mark(signer="k", sequence=4), Mark(signer="k", sequence=6)
    session = Session()
    session.handle(TaskArrived(task=numbered(4), mark=first), 0.0)
    assert session.state.mark == first
    session.handle(TaskArrived(task=numbered(5), mark=Mark(signer="k", sequence=5)), 1.0)
    assert session.state.task == numbered(4)  # the same task, said again
    assert session.state.mark == Mark(signer="k", sequence=5)
    session.handle(RunClosed(mark=last), 2.0)
    spool = Spool(tmp_path, max_blob_bytes=1024)
    spool.save_state(session.state)
    assert spool.load_state() == SessionState(mark=last)


@pytest.mark.parametrize(
    ("mark", "is_forgotten"),
    [(None, True), (Mark(signer="old", sequence=9), True), (Mark(signer="enrolled", sequence=9), False)],
)
def test_a_task_in_the_spool_that_the_enrolled_coordinator_did_not_sign_is_forgotten(
    mark: Mark | None, is_forgotten: bool
) -> None:
    session = Session(SessionState(task=task(), mark=mark))
    assert session.obey_only("enrolled") is is_forgotten
    assert (session.state.task is None) is is_forgotten
    assert session.state.mark == mark
    assert not Session(SessionState(mark=mark)).obey_only("enrolled")


# Files


def settings(directory: Path, trust: str) -> AgentSettings:
    path = directory / "agent.toml"
    path.write_text(f'device = "d"\nfederation = "f"\n[data]\npath = "x"\n{trust}')
    return AgentSettings.read(path)


def test_an_identity_is_read_from_paths_relative_to_the_settings(site: TrustedSite, key: SigningKey) -> None:
    directory = site.authority.directory
    device = site.device("d")
    identity = read_identity(settings(directory, site.agent_table("d").replace(f"{directory}/", "")))
    assert identity is not None
    assert (identity.key, identity.coordinator) == (signing_key(device), key.public)
    assert identity.certificate() == device.certificate_pem.decode()
    assert read_identity(settings(directory, "")) is None


@pytest.mark.parametrize("name", ["d.key", "d.crt", "coordinator.pub"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----" * 1000])
def test_a_file_of_no_use_is_named(site: TrustedSite, tmp_path: Path, name: str, content: bytes | None) -> None:
    broken = tmp_path / name
    table = site.agent_table("d").replace(str(site.authority.directory / name), str(broken))
    if content is not None:
        broken.write_bytes(content)
        broken.chmod(0o600)
    with pytest.raises(ConfigError, match=name):
        read_identity(settings(tmp_path, table))


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("broker.local", False),
        ("127.evil.example", False),
        ("10.0.0.1", False),
    ],
)
def test_only_a_broker_on_this_machine_needs_no_warning(host: str, is_here: bool) -> None:
    assert BrokerSettings(host=host).is_on_this_machine is is_here


def test_an_old_deployment_is_refused_also_after_it_was_undone_and_where_nothing_is_signed(key: SigningKey) -> None:
    topic = TOPIC.replace("task", "deployment")
    file = ModelFile(blob=BlobRef(sha256="0" * 64, size_bytes=1), size_bytes=1, precision="int8")
    old = Deploy(deployment="d1", version="v", model="global", files=(file,), sequence=7)
    undone = Rollback(deployment="d1", sequence=9)
    for signer, verifier in ((None, None), (key, None), (key, key.public)):
        message, mark = open_deployment(topic, seal(topic, encode(undone), signer), coordinator=verifier, mark=None)
        assert message == undone
        assert open_deployment(topic, seal(topic, encode(undone), signer), coordinator=verifier, mark=mark)[1] == mark
        with pytest.raises(RemoteProtocolError, match="its sequence is 7, and 9 was obeyed"):
            open_deployment(topic, seal(topic, encode(old), signer), coordinator=verifier, mark=mark)
    as_task = seal(TOPIC, encode(old), key)  # signed, but for the other topic
    with pytest.raises(RemoteProtocolError, match="sign"):
        open_deployment(topic, as_task, coordinator=key.public, mark=None)
