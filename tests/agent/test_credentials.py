"""What the daemon learns about its certificate from a child process."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reft_edge.agent import credentials
from reft_edge.agent.certificate_report import examine
from reft_edge.agent.credentials import WARN_BEFORE, Credentials, ReportRequest, expiry_warning
from reft_edge.agent.settings import AgentSettings, AgentTrust
from reft_edge.data.settings import DataSettings
from reft_edge.errors import RemoteProtocolError, ResourceError
from reft_edge.wire.endpoint import BrokerSettings
from tests.certificates import DAY, Authority, Issued, PrivateKey


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, ends=999 * DAY)


@pytest.fixture
def pi(authority: Authority) -> Issued:
    return authority.issue("pi-1", ends=2 * DAY)


def of(issued: Issued, *, device: str = "pi-1", ca_file: str = "ca.crt") -> Credentials:
    broker = BrokerSettings(
        ca_file=ca_file, certificate_file=issued.certificate_file.name, key_file=issued.key_file.name
    ).resolved_in(issued.certificate_file.parent)
    return Credentials(AgentSettings(device=device, federation="birds", data=DataSettings(path="data"), broker=broker))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("good", "nothing is wrong with our certificate that can be seen from here (valid until "),
        ("expired", "pi-1.crt: it expired on "),
        ("early", "; is the clock right?"),
        ("another device", "pi-1.crt: it names 'pi-1' and not 'pi-2'"),
        ("another authority", "pi-1.crt: it was signed by another authority than ca_file's"),
        ("no such file", "pi-1.crt cannot be read: No such file or directory"),
    ],
)
def test_a_refusal_is_explained(authority: Authority, tmp_path: Path, kind: str, words: str) -> None:
    dates = {"expired": (-2 * DAY, -DAY), "early": (DAY, 2 * DAY)}.get(kind, (-DAY, DAY))
    issued = authority.issue("pi-1", starts=dates[0], ends=dates[1])
    Authority(tmp_path, "other")
    if kind == "no such file":
        issued.certificate_file.unlink()
    mine = of(
        issued,
        device="pi-2" if kind == "another device" else "pi-1",
        ca_file="other.crt" if kind == "another authority" else "ca.crt",
    )
    assert words in mine.explain_refusal()


def test_without_a_certificate_there_is_nothing_to_explain() -> None:
    settings = AgentSettings(device="pi-1", federation="birds", data=DataSettings(path="data"))
    mine = Credentials(settings)
    assert mine.explain_refusal() == mine.expiry_warning() == ""
    with pytest.raises(RemoteProtocolError, match="name none"):
        mine.accept_renewal(b"x")


def test_a_renewal_replaces_the_certificate_and_ends_the_warning(authority: Authority, pi: Issued) -> None:
    mine = of(pi)
    assert "pi-1.crt ends on" in mine.expiry_warning()
    renewed = authority.issue("pi-1", key=pi.key, ends=400 * DAY, file_name="renewed")
    assert "our certificate was renewed (valid until " in mine.accept_renewal(renewed.certificate_pem)
    assert pi.certificate_file.read_bytes() == renewed.certificate_pem
    assert mine.expiry_warning() == ""


def test_a_renewal_that_is_here_already_costs_no_process(pi: Issued, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert of(pi).accept_renewal(pi.certificate_pem + b"\n") == ""


@pytest.mark.parametrize("kind", ["older", "text", "binary", "large"])
def test_a_renewal_that_is_refused_changes_nothing(authority: Authority, pi: Issued, kind: str) -> None:
    pem, words = {
        "older": (authority.issue("pi-1", key=pi.key, ends=DAY, file_name="n").certificate_pem, "ours not before"),
        "text": (b"x" * 100, "not one certificate in PEM form"),
        "binary": (b"\xff", "no certificate"),
        "large": (b"x" * 9000, "9001 bytes that are no certificate"),
    }[kind]
    with pytest.raises(RemoteProtocolError, match=words):
        of(pi).accept_renewal(pem)
    assert pi.certificate_file.read_bytes() == pi.certificate_pem


def test_only_a_later_certificate_of_the_same_kind_is_a_renewal(authority: Authority, pi: Issued) -> None:
    """The child's work, done here."""

    def faults(
        name: str, *, key: PrivateKey = pi.key, ends: timedelta = 400 * DAY, client: bool = True
    ) -> tuple[str, ...]:
        issued = authority.issue(name, key=key, ends=ends, client=client, file_name="renewal")
        request = ReportRequest(
            device="pi-1",
            certificate_file=str(pi.certificate_file),
            key_file=str(pi.key_file),
            ca_file=str(authority.ca_file),
            renewal=issued.certificate_pem.decode(),
        )
        return examine(request, authority.now).faults

    assert not faults("pi-1")
    assert faults("pi-1", key=authority.issue("x").key) == ("it belongs to another private key than the one beside it",)
    assert faults("pi-2") == ("it names 'pi-2' and not 'pi-1'",)
    assert faults("pi-1", client=False) == ("it is not a client's certificate",)
    assert "it expired on" in faults("pi-1", ends=-DAY / 2)[0]
    for not_later in (DAY, 2 * DAY):
        assert "and ours not before" in faults("pi-1", ends=not_later)[0]


@pytest.mark.parametrize(
    "program", ["sleep 60", "yes", "true", "echo '{}x'"], ids=["hangs", "floods", "dies", "babbles"]
)
def test_a_child_that_gives_no_answer_is_bounded(
    authority: Authority, pi: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nexec {program}\n")
    script.chmod(0o700)
    renewal = authority.issue("pi-1", key=pi.key, ends=400 * DAY, file_name="renewed")
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(credentials, "REPORT_TIMEOUT_S", 0.2)
    mine = of(pi)
    assert "could not be examined: the process that checks certificates gives no answer" in mine.explain_refusal()
    with pytest.raises(ResourceError, match="gives no answer"):
        mine.accept_renewal(renewal.certificate_pem)
    assert pi.certificate_file.read_bytes() == pi.certificate_pem
    assert mine.expiry_warning() == ""


def test_the_certificate_of_trust_counts_where_tls_has_none(pi: Issued) -> None:
    trust = AgentTrust(key_file=str(pi.key_file), certificate_file=str(pi.certificate_file), coordinator_key_file="c")
    settings = AgentSettings(device="pi-1", federation="birds", data=DataSettings(path="data"), trust=trust)
    assert "[broker] names no ca_file" in Credentials(settings).explain_refusal()


def test_the_warning_comes_in_time() -> None:
    ends = datetime(2031, 5, 6, 7, 8, tzinfo=UTC)
    second = timedelta(seconds=1)
    assert expiry_warning("c.pem", ends, ends - WARN_BEFORE - second) == ""
    assert "ends on 2031-05-06 07:08 UTC" in expiry_warning("c.pem", ends, ends - WARN_BEFORE)
    assert "ended on 2031-05-06" in expiry_warning("c.pem", ends, ends)
    assert expiry_warning("c.pem", None, ends) == ""


def test_the_daemon_does_not_load_the_library_for_certificates() -> None:
    code = "import sys, reft_edge.agent.daemon, reft_edge.agent.identity_files; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
