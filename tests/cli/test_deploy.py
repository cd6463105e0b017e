"""`reft-edge deploy`, `rollback` and `monitor`: what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, closing

import pytest

from reft_edge.cli.main import main
from reft_edge.coordinator.store import Store
from tests.coordinator.deploying.fleet import Fleet
from tests.coordinator.deploying.versions import model_bytes

pytestmark = [pytest.mark.mosquitto, pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)]


@pytest.fixture
def fleet(tmp_path, federation, broker):
    with ExitStack() as stack:
        made = Fleet(tmp_path, federation, broker, stack)
        made.finish_run("run-1", seed=1)
        yield made


@pytest.fixture
def command(fleet, capsys):
    """Run a subcommand on the fleet's settings; returns exit code, standard output and standard error."""

    def run(name, *arguments):
        code = main([name, str(fleet.settings_file), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_deployment_is_followed_line_by_line_and_ends_with_a_table(fleet, command):
    for name in "ab":
        fleet.device(name)
    code, out, err = command("deploy", "--progress", "plain")
    assert code == 0
    lines = err.splitlines()
    assert lines[0].startswith("version run-1, the canaries are asked (")
    assert lines[-1] == "version run-1, done (2 serving)"
    rest = lines.index(next(line for line in lines if line.startswith("version run-1, the rest is asked")))
    assert lines[rest + 1].endswith(": asked")
    assert "a: serving global int8, accuracy 90.0% on 10 samples (80.0% before), p95 2 ms" in lines
    assert "version run-1, done (2 serving)" in lines
    assert "Version run-1: done" in out
    for name in "ab":
        row = next(line.split() for line in out.splitlines() if line.split()[:1] == [name])
        assert row == [name, "global", "int8", "80.0%", "90.0%", "2", "ms", "serving"]
    code, out, _ = command("deploy")
    assert (code, "Every device serves version run-1, or takes it when it comes back." in out) == (0, True)


def test_that_a_device_could_not_judge_a_version_is_told(fleet, command):
    fleet.configure(more="[deployment.rules]\nmin_holdout_samples = 11\n")
    fleet.device("a")
    code, out, _ = command("deploy", "--quiet")
    assert code == 0
    assert "No rule of accuracy was applied to it on a: fewer than 11 samples are held out there" in out


def test_a_bad_version_ends_with_8_and_the_reason_in_one_line(fleet, command):
    fleet.device("a", "refuses")
    code, out, _ = command("deploy", "--quiet")
    assert code == 8
    assert "Version run-1: rolled back" in out
    assert "Why: 1 of 1 canaries failed: a: accuracy 10.0% on its holdout, 90.0% before" in out


def test_a_dry_run_tells_nobody_and_says_why(fleet, command):
    device = fleet.device("a")
    code, out, _ = command("deploy", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)
    assert [(part["device"], part["model"], part["wave"], part["why"]) for part in plan["devices"]] == [
        ("a", "global", "canary", "the largest that fits its memory")
    ]
    code, out, _ = command("deploy", "--dry-run", "--model", "small")
    assert "it was asked for" in out
    assert device.heard == []
    assert list((fleet.results / "blobs").iterdir()) == []
    with closing(Store(fleet.results)) as store:
        assert store.deployments(fleet.federation) == []


def test_json_says_all_that_is_known_and_a_device_may_be_undone_alone(fleet, command):
    for name in "ab":
        fleet.device(name)
    code, out, _ = command("deploy", "run-1", "--json")
    result = json.loads(out)
    assert (code, result["deployment"]["state"]) == (0, "done")
    assert [part["health"][0]["metric"] for part in result["devices"]] == [0.9, 0.9]
    code, out, _ = command("rollback", "--device", "b", "--json")
    (result,) = json.loads(out)
    assert (code, [(part["device"], part["state"]) for part in result["devices"]]) == (0, [("b", "rolled_back")])
    code, out, _ = command("rollback", "--progress", "plain")
    assert code == 0
    assert "Version run-1: rolled back" in out
    assert fleet.devices["a"].serving is None


def test_undoing_again_says_that_there_is_nothing_to_undo_and_what_is_served(fleet, command):
    fleet.device("a")
    fleet.finish_run("run-2", seed=2)
    assert command("deploy", "run-1", "--quiet")[0] == command("deploy", "run-2", "--quiet")[0] == 0
    assert "Version run-2: rolled back" in command("rollback", "--quiet")[1]
    code, out, _ = command("rollback", "--quiet")
    assert code == 0
    assert out.splitlines() == [
        "Nothing to undo: version run-2 was rolled back already; served is version run-1 (1 device).",
        "Why: a person rolled it back",
        f"To go back from what is served, name it: reft-edge rollback {fleet.settings_file} VERSION",
    ]
    assert [one["was_needed"] for one in json.loads(command("rollback", "--json", "--quiet")[1])] == [False]
    code, out, _ = command("rollback", "run-1", "--quiet")
    assert (code, "Version run-1: rolled back" in out) == (0, True)
    assert "1 now serve nothing, because no version from before lies on them: a; reft-edge deploy" in out
    assert fleet.devices["a"].serving is None


def test_its_table_fits_a_terminal_that_nobody_has_widened(fleet, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fleet.device("raspberry-pi-in-the-kitchen-on-the-second-floor")
    command("deploy", "--quiet")
    _, out, _ = command("rollback", "--quiet")
    table = out.split("1 now serve nothing")[0]
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "rolled back" in table.split("Version run-1: rolled back", 1)[1]
    assert "…" not in table


def test_json_lines_tell_every_change(fleet, command):
    fleet.device("a")
    code, out, _ = command("deploy", "--progress", "json")
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["state"] for line in told][-1] == "done"
    assert [part["state"] for line in told for part in line["changed"]][:2] == ["asked", "fetching"]


def test_a_model_of_ones_own_is_deployed_under_its_name(fleet, command, tmp_path):
    device = fleet.device("a")
    path = tmp_path / "better.onnx"
    path.write_bytes(model_bytes(7))
    assert command("deploy", "--file", str(path), "--as", "better-1")[0] == 0
    assert (device.serving.version, device.serving.model, device.serving.precision) == (
        "better-1",
        "better-1",
        "float32",
    )
    path.write_bytes(model_bytes(8))
    code, _, err = command("deploy", "--file", str(path), "--as", "better-1")
    assert code == 2
    assert "version 'better-1' was deployed before with other files; give this one another name" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("deploy", "run-2"), 2, "no version 'run-2'; did you mean 'run-1'?"),
        (("deploy", "--device", "pi-3"), 2, "device 'pi-3' was never heard of"),
        (("deploy",), 8, "no device was ever heard of; start their agents"),
        (("deploy", "--file", "x.onnx"), 2, "--file needs --as NAME"),
        (("deploy", "run-1", "--file", "x.onnx", "--as", "x"), 2, "give a VERSION or --file, not both"),
        (("deploy", "--json", "--progress", "json"), 2, "both write to standard output"),
        (("rollback",), 8, "nothing was ever deployed in federation"),
        (("rollback", "--device", "pi-3"), 8, "nothing was ever deployed in federation"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(fleet, command, arguments, code, words):
    fleet.configure(settle_s=0)
    name, *rest = arguments
    found, _, err = command(name, *rest)
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert (found, line.startswith(f"reft-edge {name}: error: ")) == (code, True)
    assert words in line


@pytest.mark.parametrize("name", ["deploy", "rollback", "monitor"])
def test_while_a_coordinator_is_at_work_they_say_so(fleet, command, name):
    with closing(Store(fleet.results)):
        code, _, err = command(name)
    assert code == 8
    assert "another coordinator is at work" in err


def test_a_broker_that_is_away_is_said(fleet, command, monkeypatch):
    monkeypatch.setattr("reft_edge.coordinator.deploying.site.CONNECT_TIMEOUT_S", 0.2)
    fleet.settings_file.write_text(fleet.settings_file.read_text().replace(f"port = {fleet.broker.port}", "port = 1"))
    code, _, err = command("deploy")
    assert code == 7
    assert "error" in err


def test_a_monitor_tells_who_comes_until_it_is_ended(fleet):
    process = subprocess.Popen(
        [sys.executable, "-m", "reft_edge", "monitor", str(fleet.settings_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline().startswith(f"Watching federation {fleet.federation}")
        fleet.device("a")
        lines = [process.stdout.readline().strip() for _ in range(2)]
        assert sorted(lines) == ["a is online", "a serves nothing"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
    with closing(Store(fleet.results)) as store:
        assert [(one.device, one.online) for one in store.presence()] == [("a", True)]


def test_torch_is_not_loaded(broker):  # noqa: ARG001 the module's parameter
    names = ["cli.deploy", "cli.rollback", "cli.monitor"]
    names += [f"coordinator.deploying.{name}" for name in ("operations", "monitor", "releases", "site", "live")]
    code = f"import sys, {', '.join(f'reft_edge.{name}' for name in names)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_reads_no_model_loads_nothing_that_reads_one(broker):  # noqa: ARG001 the module's parameter
    names = "reft_edge.coordinator.deploying.operations, reft_edge.coordinator.deploying.monitor"
    code = f"import sys, {names}; print('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
