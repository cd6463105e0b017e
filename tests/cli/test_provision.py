"""`reft-edge provision` as an operator meets it; with a running broker: tests/test_broker_config.py."""

from __future__ import annotations

import json
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reft_edge.cli.main import main
from reft_edge.provisioning.directory import opened

ACTIONS = ("add-device x", "revoke x", "renew", "refresh-crl", "list")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An authority whose broker nobody runs."""
    monkeypatch.setattr("reft_edge.provisioning.live_broker.CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    directory = tmp_path / "provisioning"
    options = ["--federation", "birds", "--broker-host", "127.0.0.1", "--port", str(port)]
    assert main(["provision", "init", "--directory", str(directory), *options]) == 0
    return directory


def provision(root: Path, line: str) -> int:
    action, *arguments = line.split()
    return main(["provision", action, "--directory", str(root), *arguments])


def set_reload_command(root: Path, command: list[str]) -> None:
    path = root / "provisioning.toml"
    path.write_text(re.sub(r"(?m)^reload_command = .*$", f"reload_command = {json.dumps(command)}", path.read_text()))


@pytest.mark.parametrize("line", ACTIONS)
def test_without_a_provisioning_directory_one_line_says_how_to_make_one(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert provision(tmp_path, line) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "reft-edge provision init" in said
    assert list(tmp_path.iterdir()) == []


def test_init_says_what_comes_next_and_never_a_second_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "init --federation birds --broker-host broker.local"
    assert provision(tmp_path / "here", line) == 0
    said = capsys.readouterr().out
    for word in ("mosquitto.conf", "federation-tables.toml", "add-device", "refresh-crl", "provisioning.toml"):
        assert word in said
    assert provision(tmp_path / "here", line) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        "--federation a/b --broker-host x",
        "--federation a --broker-host x:1",
        "--federation a --broker-host x --port 0",
        "--federation a --broker-host x --certificate-days 60",
        "--federation a --broker-host x --authority-days 0",
    ],
)
def test_init_with_arguments_of_no_use_is_one_line_and_changes_nothing(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert provision(tmp_path / "here", f"init {options}") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "revoked", "further"),
    [
        ("revoke pi-01", "pi-01", "revoke pi-01"),
        # Not `revoke`, which would take the new certificate as well.
        ("add-device pi-01 --replace", "what pi-01 had", "refresh-crl"),
    ],
)
def test_a_revocation_stands_when_the_broker_cannot_be_reached(
    line: str, revoked: str, further: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert provision(root, "add-device pi-01") == 0
    assert provision(root, line) == 7
    (said,) = capsys.readouterr().err.splitlines()
    assert f"error: {revoked} is revoked and stays so" in said
    assert said.rstrip().endswith(f"go on with `reft-edge provision {further}`")
    assert "cannot be reached" in said
    capsys.readouterr()
    assert provision(root, "list --json") == 0
    rows = json.loads(capsys.readouterr().out)["certificates"]
    assert rows[2]["name"] == "pi-01"
    assert rows[2]["revoked_at"] is not None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sh", "-c", "echo no such host >&2; exit 3"], "status 3: no such host"),
        (["/no/such/program"], "No such file"),
        (["false"], "it said nothing"),
    ],
)
def test_a_reload_command_that_fails_is_named_with_its_last_words(
    command: list[str], words: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_reload_command(root, command)
    assert provision(root, "refresh-crl") == 7
    (said,) = capsys.readouterr().err.splitlines()
    assert command[0] in said
    assert words in said


def test_a_renewal_that_cannot_be_published_is_published_by_the_same_command_later(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(root, "add-device pi-01")
    assert provision(root, "renew pi-01 --publish") == 7
    assert "renewed until" in capsys.readouterr().out
    assert provision(root, "renew --publish") == 7, "it is still to be published"
    assert "nothing to renew" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["renew pi-01 --within 3", "renew --within -1", "renew nobody"])
def test_renewing_what_cannot_be_chosen_is_one_line(line: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert provision(root, line) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("age_days", "words"), [(5, ""), (25, "ends in 5 days"), (31, "refuses everybody")])
def test_a_revocation_list_near_its_end_is_warned_about(
    age_days: int, words: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    with opened(root, now=now) as provisioning:
        provisioning.write_revocation_list(now - timedelta(days=age_days))
    for line in ("list", "refresh-crl"):
        caplog.clear()
        assert provision(root, line) == 0
        assert (words in caplog.text) if words else not caplog.records
    caplog.clear()
    assert provision(root, "list") == 0
    assert not caplog.records, "it was refreshed"


def test_no_command_prints_or_logs_a_key(
    root: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = ("add-device pi-01", "add-device pi-01 --replace", "renew", "renew pi-01 --publish", "revoke pi-01", "list")
    for line in lines:
        main(["provision", "--verbose", line.split()[0], "--directory", str(root), *line.split()[1:]])
    said = "".join([*capfd.readouterr(), caplog.text])
    bodies = [
        body
        for path in root.rglob("*")
        if path.is_file()
        for body in re.findall(r"PRIVATE KEY-----\s*(?:\\n)?([A-Za-z0-9+/]{20,})", path.read_text())
    ]
    assert len(bodies) >= 5
    assert not [body for body in bodies if body in said]
    assert "PRIVATE KEY" not in said
