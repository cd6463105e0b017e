"""Installing an enrolment: all or nothing, and nothing that does not fit together."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from reft_edge.agent.enrolment import check_enrolment, install, read_enrolment
from reft_edge.agent.identity_files import finish_install
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import Spool
from reft_edge.agent.trust import read_identity
from reft_edge.errors import ConfigError, ResourceError
from reft_edge.wire.enrolment import Enrolment, encode_enrolment
from tests.certificates import DAY, Authority, public_pem

NOW = datetime(2031, 5, 6, 7, 8, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority", now=NOW, ends=99 * DAY)


def make_enrolment(authority: Authority, device: str = "pi-1") -> Enrolment:
    """With a new key each time."""
    issued = authority.issue(device)
    return Enrolment(
        device=device,
        federation="birds",
        broker_host="broker.local",
        broker_port=8883,
        ca=authority.ca_pem.decode(),
        certificate=issued.certificate_pem.decode(),
        key=issued.key_pem.decode(),
        coordinator_key=public_pem(authority.issue("coordinator").key).decode(),
    )


@pytest.fixture
def enrolment(authority: Authority) -> Enrolment:
    return make_enrolment(authority)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in directory.iterdir()}


def test_what_is_installed_is_a_complete_identity(enrolment: Enrolment, tmp_path: Path) -> None:
    directory = tmp_path / "new" / "agent"
    installed = install(enrolment, directory)
    assert not installed.settings_kept
    settings = AgentSettings.read(installed.settings_file)
    assert (settings.device, settings.federation) == ("pi-1", "birds")
    assert (settings.broker.address, settings.broker.uses_tls) == ("broker.local:8883", True)
    assert settings.broker.tls_context() is not None
    assert read_identity(settings) is not None
    assert sorted(contents(directory)) == ["agent.toml", "ca.pem", "coordinator.pem", "identity.key", "identity.pem"]
    assert stat.S_IMODE((directory / "identity.key").stat().st_mode) == 0o600


def test_what_root_installs_belongs_to_the_owner_of_the_folder(
    enrolment: Enrolment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[int, int] = {}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda file, owner, _group: given.update({os.fstat(file).st_ino: owner}))
    monkeypatch.setattr(os, "chown", lambda *_: None)
    install(enrolment, tmp_path / "agent")
    owner = (tmp_path / "agent").stat().st_uid
    assert given == {path.stat().st_ino: owner for path in (tmp_path / "agent").iterdir()}


def test_settings_that_exist_are_kept_and_what_they_lack_is_named(enrolment: Enrolment, tmp_path: Path) -> None:
    own = 'device = "pi-1"\nfederation = "birds"\n[data]\npath = "sensors.csv"\n[broker]\nhost = "broker.local"\n'
    (tmp_path / "agent.toml").write_text(own)
    installed = install(enrolment, tmp_path)
    assert installed.settings_kept
    assert installed.advice == (
        "[broker] port = 8883",
        '[broker] ca_file = "ca.pem"',
        '[broker] certificate_file = "identity.pem"',
        '[broker] key_file = "identity.key"',
        '[trust] key_file = "identity.key"',
        '[trust] certificate_file = "identity.pem"',
        '[trust] coordinator_key_file = "coordinator.pem"',
    )
    assert (tmp_path / "agent.toml").read_text() == own


def test_enrolling_again_has_nothing_to_advise(enrolment: Enrolment, authority: Authority, tmp_path: Path) -> None:
    install(enrolment, tmp_path)
    again = make_enrolment(authority)
    installed = install(again, tmp_path)
    assert (installed.settings_kept, installed.advice) == (True, ())
    assert (tmp_path / "identity.key").read_text() == again.key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "pi-2"}, "has device = 'pi-1' and .* for 'pi-2'"),
        ({"federation": "bees"}, "has federation = 'birds'"),
    ],
)
def test_another_devices_folder_is_left_as_it_is(
    enrolment: Enrolment, tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    install(enrolment, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=words):
        install(msgspec.structs.replace(enrolment, **changes), tmp_path)
    assert contents(tmp_path) == before


class KilledError(BaseException):
    """Nothing in the package handles it, so what follows does not happen."""


def test_a_device_is_not_enrolled_under_an_agent_that_runs(
    enrolment: Enrolment, authority: Authority, tmp_path: Path
) -> None:
    install(enrolment, tmp_path)
    spool = Spool(tmp_path / "spool", max_blob_bytes=1)
    spool.lock()
    before = contents(tmp_path)
    assert stat.S_IMODE(spool.root.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match=r"an agent runs with .*agent\.toml; stop it, enrol again, and start it"):
        install(make_enrolment(authority), tmp_path)
    assert contents(tmp_path) == before
    spool.unlock()
    install(make_enrolment(authority), tmp_path)
    assert contents(tmp_path) != before


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die right before the given one of all later calls that change the disk."""
    calls = [0]

    def killing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            calls[0] += 1
            if calls[0] == step:
                raise KilledError
            return real(*arguments, **named)

        return call

    for name in ("mkdir", "open", "fsync", "rename", "replace", "rmdir"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))


@pytest.mark.parametrize("first", [True, False], ids=["first enrolment", "with a new key"])
def test_a_kill_at_any_moment_leaves_the_old_identity_or_the_new_one(
    authority: Authority, tmp_path: Path, first: bool
) -> None:
    template, complete = tmp_path / "template", tmp_path / "complete"
    for folder in (template, complete):
        folder.mkdir()
    if not first:
        old = make_enrolment(authority)
        install(old, template)
        install(old, complete)
    new = make_enrolment(authority)
    install(new, complete)
    outcomes = []
    killed = True
    while killed:
        directory = tmp_path / f"{len(outcomes)}"
        shutil.copytree(template, directory)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(1 + len(outcomes), patch)
            try:
                install(new, directory)
            except KilledError:
                killed = True
            else:
                killed = False
        finish_install(directory)
        after = contents(directory)
        assert after in (contents(template), contents(complete))
        outcomes.append(after == contents(template))
    assert outcomes == sorted(outcomes, reverse=True), "once it is installed it stays so"
    assert set(outcomes) == {True, False}


def test_a_disk_that_refuses_is_one_clear_line_and_leaves_no_key(
    enrolment: Enrolment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="choose a --directory that can be written"):
        install(enrolment, tmp_path / "file" / "agent")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        install(enrolment, tmp_path / "full")
    assert contents(tmp_path / "full") == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, other: {"key": other.key}, "belongs to another private key"),
        (lambda *_: {"device": "pi-9"}, "certificate for pi-9: it names 'pi-1' and not 'pi-9'"),
        (lambda _, other: {"ca": other.ca}, "signed by another authority"),
        (lambda e, _: {"key": e.key[:60] + "\n"}, "x.enrol: the private key cannot be read"),
        (lambda e, _: {"ca": e.certificate}, "x.enrol: the certificate in ca_file is not an authority's"),
        (lambda e, _: {"coordinator_key": e.coordinator_key[:40]}, "x.enrol: the coordinator's public key"),
    ],
    ids=["key", "device", "authority", "cut key", "no authority", "coordinator's key"],
)
def test_parts_that_do_not_fit_are_refused(
    enrolment: Enrolment,
    tmp_path: Path,
    change: Callable[[Enrolment, Enrolment], dict[str, str]],
    words: str,
) -> None:
    other = make_enrolment(Authority(tmp_path / "other", now=NOW, ends=99 * DAY))
    assert check_enrolment(enrolment, origin="x.enrol", now=NOW) == NOW + DAY
    with pytest.raises(ConfigError, match=words) as caught:
        check_enrolment(msgspec.structs.replace(enrolment, **change(enrolment, other)), origin="x.enrol", now=NOW)
    for line in enrolment.key.splitlines()[1:-1]:
        assert line not in str(caught.value)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), "not valid before .*the clock here says 1970-01-01 00:00 UTC; is the clock"),
        (NOW + 2 * DAY, "expired on 2031-05-07"),
    ],
    ids=["board without a clock battery", "a year in a drawer"],
)
def test_dates_are_compared_with_the_clock(enrolment: Enrolment, now: datetime, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_enrolment(enrolment, origin="x.enrol", now=now)


def test_a_file_that_cannot_be_read_is_one_clear_line(enrolment: Enrolment, tmp_path: Path) -> None:
    (tmp_path / "pi-1.enrol").write_bytes(encode_enrolment(enrolment))
    assert read_enrolment(tmp_path / "pi-1.enrol") == enrolment
    with pytest.raises(ConfigError, match=r"no\.enrol cannot be read: No such file"):
        read_enrolment(tmp_path / "no.enrol")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_enrolment(tmp_path)
