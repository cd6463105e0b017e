"""`status`, `devices`, `rounds`, `watch`, `report`: what lies on disk is shown, beside the coordinator and after it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import closing

import msgspec
import pytest

from reft_edge.cli.main import main
from reft_edge.coordinator import events
from reft_edge.coordinator.database import is_at_work
from reft_edge.coordinator.event_log import EventLog, follow_log
from reft_edge.coordinator.records import ConditionRecord
from reft_edge.coordinator.store import Store
from reft_edge.errors import FederationError
from reft_edge.wire.deployment import Condition
from tests.written_deployment import asked, deployment, served, write, write_rollout
from tests.written_run import FINISHED, RUN, SETTINGS, tell_on, told, write_run


@pytest.fixture
def federation(tmp_path):
    return write_run(tmp_path)


def answer(capsys, *arguments: object) -> str:
    assert main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


def test_status_says_where_the_run_stands_and_who_has_trouble(federation, capsys):
    text = answer(capsys, "status", federation)
    assert "round 1 of 2: interrupted: the coordinator is not running" in text
    assert "accuracy by round: 50.0%" in text
    assert "3 devices, 1 failed, 1 merged, 1 quarantine" in text
    assert "pi-2 (failed): no space left on the device" in text
    assert "pi-3 (quarantine): three bad updates" in text


def test_status_sees_a_coordinator_at_work(federation, capsys):
    with closing(Store(federation.parent / "federation")):
        assert json.loads(answer(capsys, "status", federation, "--json"))["at_work"] is True
    found = json.loads(answer(capsys, "status", federation, "--json"))
    assert (found["at_work"], found["watched"]) == (False, False)


def test_a_run_is_interrupted_while_only_a_monitor_or_a_deployment_is_at_work(federation, capsys):
    with closing(Store(federation.parent / "federation", holder="operator")):
        assert "interrupted: the coordinator is not running" in answer(capsys, "status", federation)
        found = json.loads(answer(capsys, "status", federation, "--json"))
        assert (found["at_work"], found["watched"]) == (False, True)
        assert is_at_work(federation.parent / "federation")
        with pytest.raises(FederationError):
            Store(federation.parent / "federation")
        assert "interrupted" in answer(capsys, "status", federation), "who knocked in vain does not count"


def test_asking_who_is_at_work_does_not_keep_a_coordinator_out(tmp_path):
    Store(tmp_path).close()
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.002):
            is_at_work(tmp_path)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(20):
            Store(tmp_path).close()
    finally:
        stop.set()
        asking.join()


def test_devices_are_told_whole_as_json(federation, capsys):
    one, two, three = json.loads(answer(capsys, "devices", federation, "--json"))
    assert (one["device"], one["state"], one["profile"], one["training_samples"]) == ("pi-1", "merged", "pi-4", 9)
    assert (one["predicted_s"], one["measured_s"], one["share"]) == (3.5, 3.5, 0.25)
    assert (one["temperature_celsius"], one["throttled"], one["updates"]) == (81.0, True, {"received": 1})
    assert one["seen_at"] == 2e9, "an event is later than the announcement"
    assert (two["state"], two["reason"]) == ("failed", "no space left on the device")
    assert (three["state"], three["seen_at"], three["share"]) == ("quarantine", 1e9, None)


def test_the_table_of_devices_fits_a_terminal(federation, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = answer(capsys, "devices", federation)
    assert "merged, 81 °C" in text
    assert "1 of 1" in text
    assert "…" not in text


def test_what_is_served_and_who_predicts_unlike_the_rest_is_told(federation, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "deployment" not in answer(capsys, "status", federation)
    assert "serves" not in answer(capsys, "devices", federation)
    write_rollout(federation.parent)
    text = answer(capsys, "status", federation)
    assert f"deployment d-2 of {RUN}: rolling out, 1 away, 1 checking, 1 refused, 1 serving, 1 waiting" in text
    assert f"served now: {RUN} by 6" in text
    departs = "pi-1 departs from the others: predicts class robin in 94% of cases, the others in 36%"
    assert departs in text
    assert departs in answer(capsys, "devices", federation)
    found = json.loads(answer(capsys, "status", federation, "--json"))
    assert (found["deployment"]["state"], found["deployment"]["devices"]["serving"]) == ("rolling_out", 1)
    first, *_ = json.loads(answer(capsys, "devices", federation, "--json"))
    assert (first["serving"]["version"], first["serving"]["precision"], len(first["departs"])) == (RUN, "int8", 1)


def test_what_a_device_says_commands_no_terminal_and_forges_no_line(federation, capsys):
    serving = msgspec.structs.replace(served("d-1"), model="x\x1b[2J[/red]\nforged")
    with closing(Store(federation.parent / "federation", shared=True)) as store:
        told = ConditionRecord(device="pi-1", condition=Condition(serving=serving), seen_at=1e9)
        store.save_heard(conditions=[told])
    tell_on(federation, events.DeviceProgress(round=2, device="pi-1", state="failed", reason="\x1b]0;x\x07\nforged"))
    for command in ("status", "devices"):
        lines = answer(capsys, command, federation).splitlines()
        assert all(line.isprintable() for line in lines)
        assert not any(line.startswith("forged") for line in lines)


def test_devices_of_a_federation_that_only_deploys_are_told(tmp_path, capsys):
    path = tmp_path / "federation.toml"
    path.write_text(SETTINGS)
    Store(tmp_path / "federation").close()
    write_rollout(tmp_path)
    assert "federation birds: nothing was trained yet" in answer(capsys, "status", path)
    assert len(json.loads(answer(capsys, "devices", path, "--json"))) == 6


def test_rounds_tell_accuracy_and_bytes(federation, capsys):
    text = answer(capsys, "rounds", federation)
    assert "50.0%" in text
    assert "2.0 KiB" in text
    (only,) = json.loads(answer(capsys, "rounds", federation, "--json"))
    assert (only["merged"], only["updates"], only["asked"]) == (0.5, 1, 2)


def test_a_report_is_made_of_a_run_that_has_not_ended_and_of_a_copied_folder(federation, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert answer(capsys, "report", federation, "--output", page).strip() == str(page)
    assert "birds" in page.read_text()
    figures = json.loads(answer(capsys, "report", federation.parent / "federation" / RUN, "--json"))
    assert (figures["run"], figures["finished"], figures["value"]) == (RUN, False, 0.5)


def test_a_report_tells_what_devices_made_of_the_run_if_it_was_deployed_last(federation, capsys, tmp_path):
    assert json.loads(answer(capsys, "report", federation, "--json"))["deployed"] == []
    write_rollout(federation.parent)
    deployed = json.loads(answer(capsys, "report", federation, "--json"))["deployed"]
    assert "serving" in [one["state"] for one in deployed]
    page = tmp_path / "page.html"
    answer(capsys, "report", federation, "--output", page)
    assert "<h2>Deployed</h2>" in page.read_text()
    other = deployment("d-3", "canary", version="another", started_at=2e9)
    write(federation.parent, deployments=[(other, [asked("d-3", "pi-1")])])
    assert json.loads(answer(capsys, "report", federation, "--json"))["deployed"] == []


def test_following_ends_with_the_run_and_takes_lines_that_come_in_pieces(tmp_path):
    path = tmp_path / "events.jsonl"
    lines = b"".join(msgspec.json.encode(event) + b"\n" for event in [*told(), FINISHED])
    pieces = [lines[:100], lines[100:101], lines[101:]]

    def write_on() -> None:
        with path.open("ab") as file:
            file.write(pieces.pop(0))

    assert list(follow_log(path, wait=write_on)) == [*told(), FINISHED]


def test_watching_goes_on_over_rounds_that_follow_a_finished_run(tmp_path):
    path = tmp_path / "events.jsonl"
    again = msgspec.structs.replace(FINISHED, rounds=2)
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in (FINISHED, *told(), again)))
    assert list(follow_log(path, wait=pytest.fail)) == [FINISHED, *told(), again]


def test_watch_follows_a_run_from_another_process(federation):
    command = [sys.executable, "-m", "reft_edge", "watch", str(federation), "--json"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as watching,
        EventLog(federation.parent / "federation" / RUN, events.ignore) as tell,
    ):
        assert watching.stdout is not None
        for event in told():
            assert json.loads(watching.stdout.readline())["event"] == event.__struct_config__.tag
        tell(FINISHED)
        assert json.loads(watching.stdout.readline())["event"] == "finished"
        assert watching.wait() == 0


BAD = {
    "no such run": (["status", "{file}", "--run", "x"], 2, "has no run 'x'; the latest are: " + RUN),
    "no such file": (["devices", "{file}x"], 2, "no such file"),
    "no such folder": (["report", "{file}x"], 2, "does not exist; give federation.toml, or a run's folder"),
    "another folder": (["report", "{folder}"], 8, "is {folder} the folder of a run?"),
    "a folder that is not there": (["report", "{file}", "--output", "{folder}/a/b.html"], 9, "cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(federation, capsys, name):
    arguments, code, message = BAD[name]
    places = {"file": federation, "folder": federation.parent}
    assert main([one.format(**places) for one in arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(**places) in line


def test_a_federation_that_never_ran_says_so(tmp_path, capsys):
    path = tmp_path / "federation.toml"
    path.write_text(SETTINGS)
    assert main(["status", str(path)]) == 8
    assert "has no store yet" in capsys.readouterr().err
