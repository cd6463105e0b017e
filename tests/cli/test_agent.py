"""`reft-edge agent --enrol` and `--check`, against a broker that asks for certificates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from reft_edge.agent.serving.slots import SERVING, Slots
from reft_edge.cli.main import main
from reft_edge.wire.enrolment import Enrolment, encode_enrolment
from tests.agent.serving.models import spoil
from tests.agent.serving.test_slots import serve
from tests.certificates import DAY, Authority, public_pem, tls_broker


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = Authority(tmp_path / "authority", ends=999 * DAY)
    authority.issue_server()
    return authority


@pytest.fixture
def enrolment(authority: Authority) -> Enrolment:
    issued = authority.issue("pi-1", ends=400 * DAY)
    return Enrolment(
        device="pi-1",
        federation="birds",
        broker_host="localhost",
        broker_port=1,
        ca=authority.ca_pem.decode(),
        certificate=issued.certificate_pem.decode(),
        key=issued.key_pem.decode(),
        coordinator_key=public_pem(authority.issue("coordinator").key).decode(),
    )


@pytest.fixture
def file(enrolment: Enrolment, tmp_path: Path) -> Path:
    path = tmp_path / "pi-1.enrol"
    path.touch(mode=0o600)
    path.write_bytes(encode_enrolment(enrolment))
    return path


def enrol(enrolment: Enrolment, directory: Path) -> Path:
    """Enrol into `directory`, with data beside it; returns the settings file."""
    file = directory.with_suffix(".enrol")
    file.write_bytes(encode_enrolment(enrolment))
    assert main(["agent", "--enrol", str(file), "--directory", str(directory)]) == 0
    settings = directory / "agent.toml"
    text = settings.read_text().replace('path = "data"', 'path = "data.npz"')
    settings.write_text(text.replace("[broker]\n", "[broker]\nconnect_timeout_s = 1\n"))
    np.savez(directory / "data.npz", inputs=np.zeros((20, 3), np.float32), targets=np.arange(20) % 2)
    return settings


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails; its one line of explanation."""
    capsys.readouterr()
    assert main(["agent", *arguments]) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_enrolling_removes_the_file_and_shows_no_key(
    file: Path, enrolment: Enrolment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["agent", "--enrol", str(file), "--directory", str(tmp_path / "pi")]) == 0
    output, errors = capsys.readouterr()
    assert output.splitlines()[0] == "enrolled pi-1 in federation birds"
    assert f"{tmp_path / 'pi' / 'agent.toml'} --check" in output
    assert errors == ""
    assert not file.exists()
    assert enrolment.key.splitlines()[1] not in output


def test_a_file_is_kept_on_request_and_one_that_others_may_read_is_warned_of(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.chmod(0o644)
    assert main(["agent", "--enrol", str(file), "--directory", str(tmp_path / "pi"), "--keep"]) == 0
    warnings = capsys.readouterr().err
    assert "warning: other users of this machine may have read" in warnings
    assert "warning: " + str(file) + " holds this device's private key" in warnings
    assert file.exists()


def test_without_a_directory_it_is_enrolled_here(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["agent", "--enrol", file.name]) == 0
    assert (tmp_path / "agent.toml").exists()
    # and agent.toml is the settings file where none is named
    assert "data does not exist" in fail(capsys, "--check")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["agent.toml", "--enrol", "x"], "--enrol stands alone"),
        (["--check", "--enrol", "x"], "--enrol stands alone"),
        (["agent.toml", "--keep"], "belong to --enrol"),
        (["--enrol", "/nowhere/x"], "enrolment file /nowhere/x cannot be read: No such file"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in fail(capsys, *arguments)


@pytest.fixture
def port(authority: Authority, mosquitto_program: str) -> Iterator[int]:
    """Of a broker on whose list stands the device `stolen`."""
    authority.revoke(authority.issue("stolen"))
    with tls_broker(mosquitto_program, authority.directory) as port:
        yield port


@pytest.mark.mosquitto
def test_an_enrolled_device_passes_every_check(
    enrolment: Enrolment, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = enrol(msgspec.structs.replace(enrolment, broker_port=port), tmp_path / "pi")
    capsys.readouterr()
    assert main(["agent", str(settings), "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["broker"]) == ("pi-1", f"localhost:{port}")
    assert found["certificate_ends"].endswith("UTC")
    assert found["serving"] == "nothing"
    assert not (tmp_path / "pi" / "spool").exists(), "the check leaves nothing"
    slots = Slots(tmp_path / "pi" / "spool" / SERVING)
    serve(slots, "one")
    for damaged in (False, True):
        if damaged:
            spoil(slots.root / "a" / "model.onnx")
        main(["agent", str(settings), "--check", "--json"])
        words = json.loads(capsys.readouterr().out)["serving"]
        assert words.startswith("version-one (global, int8)")
        assert ("damaged" in words) == damaged


@pytest.mark.mosquitto
def test_too_few_samples_to_judge_a_version_are_a_warning(
    enrolment: Enrolment, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = enrol(msgspec.structs.replace(enrolment, broker_port=port), tmp_path / "pi")
    capsys.readouterr()
    assert main(["agent", str(settings), "--check"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("everything is all right\n")
    assert "warning: with 4 samples held out this device cannot judge a version; 10 are needed" in err
    np.savez(settings.parent / "data.npz", inputs=np.zeros((60, 3), np.float32), targets=np.arange(60) % 2)
    assert main(["agent", str(settings), "--check"]) == 0
    assert "cannot judge" not in capsys.readouterr().err


@pytest.mark.mosquitto
def test_a_revoked_device_hears_both_what_the_broker_says_and_what_is_seen_here(
    enrolment: Enrolment, authority: Authority, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate = (authority.directory / "stolen.crt").read_text()
    key = (authority.directory / "stolen.key").read_text()
    stolen = msgspec.structs.replace(enrolment, device="stolen", broker_port=port, certificate=certificate, key=key)
    line = fail(capsys, str(enrol(stolen, tmp_path / "pi")), "--check")
    assert "says that our certificate is revoked" in line
    assert "nothing is wrong with our certificate that can be seen from here" in line


def test_an_identity_that_does_not_fit_is_named_before_the_broker_is_asked(
    enrolment: Enrolment, authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = enrol(enrolment, tmp_path / "pi")
    installed = tmp_path / "pi" / "identity.pem"
    for issued, words in (
        (authority.issue("pi-2"), "it names 'pi-2' and not 'pi-1'"),
        (authority.issue("pi-1", ends=-DAY / 2), "it expired on"),
    ):
        installed.write_bytes(issued.certificate_pem)
        line = fail(capsys, str(settings), "--check")
        assert f"certificate {installed}: {words}" in line
    settings.write_text(settings.read_text().replace('key_file = "identity.key"', 'key_file = "other.key"', 1))
    (tmp_path / "pi" / "other.key").write_bytes((tmp_path / "pi" / "identity.key").read_bytes())
    assert "a device has one identity" in fail(capsys, str(settings), "--check")


def test_a_certificate_that_soon_ends_is_warned_of(
    enrolment: Enrolment, authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = authority.issue("pi-1", ends=9 * DAY)
    ending = msgspec.structs.replace(
        enrolment, certificate=issued.certificate_pem.decode(), key=issued.key_pem.decode()
    )
    settings = enrol(ending, tmp_path / "pi")
    capsys.readouterr()
    assert main(["agent", str(settings), "--check"]) == 7
    assert "warning: our certificate" in capsys.readouterr().err


def test_a_spool_that_cannot_be_written_is_named(
    enrolment: Enrolment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = enrol(enrolment, tmp_path / "pi")
    settings.write_text('spool = "data.npz/spool"\n' + settings.read_text())
    line = fail(capsys, str(settings), "--check")
    assert f"spool {tmp_path / 'pi' / 'data.npz' / 'spool'} cannot be written: Not a directory" in line


def test_an_enrolment_that_was_interrupted_is_finished_by_the_next_start(
    enrolment: Enrolment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "pi"
    enrol(enrolment, directory)
    (directory / ".enrolment").mkdir()
    for name in ("identity.pem", "agent.toml"):
        (directory / name).rename(directory / ".enrolment" / name)
    assert "nobody listens at localhost:1" in fail(capsys, str(directory / "agent.toml"), "--check")
    assert not (directory / ".enrolment").exists()
