"""The demo as a person runs it: real processes, from the command line to the report, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

import reft_edge
from reft_edge.agent.settings import AgentSettings
from reft_edge.coordinator.report.record import RunReport
from reft_edge.coordinator.settings import load_federation
from tests.refusals import refusal

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(reft_edge.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def start(*arguments):
    command = [sys.executable, "-m", "reft_edge", "demo", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_in(directory):
    """Processes that work in `directory` or were started with it, zombies apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                inside = (entry / "cwd").readlink().is_relative_to(directory)
                named = str(directory).encode() in (entry / "cmdline").read_bytes()
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except (OSError, IndexError):
                continue
            if alive and (inside or named):
                found.append(entry.name)
    return found


def wait_until_gone(directory, timeout_s=30.0):
    end = time.monotonic() + timeout_s
    while processes_in(directory):
        assert time.monotonic() < end, "the demo left processes behind"
        time.sleep(0.05)  # processes that are not our children send no event


def wait_for_line(demo, beginning):
    """Read on until a line begins so; returns the lines until there."""
    lines = []
    for line in demo.stderr:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    pytest.fail(f"the demo ended before {beginning!r}: {''.join(lines)[-2000:]}")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.mosquitto
@pytest.mark.usefixtures("mosquitto_program")
def test_a_quick_demo_with_keys_and_tls_ends_with_a_good_model_a_report_and_no_process(tmp_path):
    directory = tmp_path / "run"
    demo = start("--quick", "--json", "--broker", "mosquitto", "--output", str(directory))
    assert wait_for_line(demo, "round 1: ")[0] == "mutual TLS, signed tasks and updates\n"
    settings = [AgentSettings.read(path) for path in directory.glob("devices/*/agent.toml")]
    for each in (*settings, load_federation(directory / "federation.toml")):
        assert each.trust is not None  # so what is not signed is dropped
        assert each.broker.certificate_file is not None
    nameless = msgspec.structs.replace(settings[0].broker, certificate_file=None, key_file=None)
    assert "wants a client certificate" in str(refusal(nameless, "nameless"))
    output, errors = demo.communicate(timeout=390)
    assert demo.returncode == 0, errors[-2000:]
    report = msgspec.json.decode(output, type=RunReport)
    assert report == msgspec.json.decode((directory / "report.json").read_bytes(), type=RunReport)
    assert report.finished
    assert report.value > report.central.value - 0.05
    assert len(report.rounds) == 2
    assert report.setting["security"] == "mutual TLS, signed tasks and updates"
    assert len({device.ratio for device in report.devices}) > 1
    assert all(0 < device.up_bytes < report.unpruned_bytes for device in report.devices)
    assert {"global", "global.int8"} < {exported.name for exported in report.exports}
    assert {one.device for one in report.deployed} == {one.device for one in report.devices}
    assert {one.state for one in report.deployed} == {"serving"}
    assert "</html>" in (directory / "report.html").read_text()
    wait_until_gone(directory)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks into /proc, and a killed parent is told on Linux"
)
@pytest.mark.parametrize(
    ("broker", "number", "moment", "code"),
    [
        ("embedded", signal.SIGINT, "round 1", 130),
        ("auto", signal.SIGTERM, "started", 143),
        ("auto", signal.SIGKILL, "started", -9),
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_ended_in_the_middle_it_leaves_no_process_behind(tmp_path, broker, number, moment, code):
    directory = tmp_path / "run"
    demo = start("--broker", broker, "--output", str(directory))
    wait_for_line(demo, moment)
    assert processes_in(directory)
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode == code
    wait_until_gone(directory)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--broker", "127.0.0.1:{free}"], 7, "no broker answers at 127.0.0.1:{free}"),
        (["--broker", "localhost"], 2, "neither auto, embedded or mosquitto nor HOST:PORT"),
        (["--seed", "-1"], 2, "--seed -1"),
        (["--output", __file__], 2, "--output"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, arguments, code, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    demo = start("--output", str(tmp_path / "run"), *(argument.format(free=free) for argument in arguments))
    output, errors = demo.communicate(timeout=60)
    assert (demo.returncode, output) == (code, "")
    assert message.format(free=free) in errors
    assert errors.count("\n") == 1
