"""What the deployment benchmark measures with, without a fleet; with one: tests/test_deployment.py."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

from reft_edge.bundle.inference import ORT_ERRORS
from reft_edge.coordinator.store import Store
from reft_edge.simulation.deployments.bad_models import BRITTLE_SUM, MADE_FROM_A_GOOD_ONE, Badness
from reft_edge.simulation.deployments.breaking import DEPLOYMENT_STATES, DEVICE_STAGES, KINDS, draw
from reft_edge.simulation.deployments.load import Answer, Load
from reft_edge.simulation.deployments.records import (
    BENCHMARK,
    DeployRun,
    DeploySettings,
    Rollout,
    Stopped,
    Survived,
    Swaps,
    Window,
)
from reft_edge.simulation.deployments.section import section
from reft_edge.simulation.deployments.served import Switch
from reft_edge.simulation.deployments.swapping import summarize
from reft_edge.simulation.deployments.trial import missing
from reft_edge.simulation.deployments.versions import HALF, VersionOptions, make_versions, put_into_store
from reft_edge.simulation.digits import Digits, load_digits_split
from reft_edge.simulation.faults.words import COORDINATOR
from reft_edge.simulation.results.results_file import ResultsFile

RUN_ON_A_SAMPLE = """
import sys, resource, numpy, onnxruntime
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {"inputs": numpy.ones((1, 1, 8, 8), numpy.float32)})
"""


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits_split(2, alpha=100.0, seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("versions")
    wanted = {"trained": VersionOptions(seed=1, epochs=3), "random": VersionOptions(seed=1, epochs=0)}
    return make_versions(folder, wanted, digits, ratios=(HALF,))


def test_a_version_is_what_a_finished_run_leaves(made, tmp_path) -> None:
    assert [record.name for record in made["trained"]] == ["variant-0.5", "variant-0.5.int8"]
    accuracies = {version: [record.values["accuracy"] for record in records] for version, records in made.items()}
    assert min(accuracies["trained"]) > 0.8 > 0.3 > max(accuracies["random"])

    put_into_store(tmp_path, "birds", "trained", made["trained"], devices={"pi": 0.5}, at=1e9)
    with closing(Store(tmp_path, shared=True)) as store:
        (run,) = store.runs("birds")
        assert (run.run, run.state) == ("trained", "finished")
        assert [record.ratio for record in store.history("trained")] == [0.5]
        exports = store.exports("trained")
    assert all(Path(record.path).parent == tmp_path / "trained" / "models" for record in exports)
    assert Path(exports[0].path).read_bytes() == Path(made["trained"][0].path).read_bytes()


def bad_file(made, badness: Badness, folder: Path) -> Path:
    path = folder / f"{badness}.onnx"
    path.write_bytes(MADE_FROM_A_GOOD_ONE[badness](Path(made["trained"][0].path).read_bytes()))
    return path


def test_the_brittle_model_is_right_until_inputs_are_large(made, digits, tmp_path) -> None:
    good, brittle = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (made["trained"][0].path, bad_file(made, "brittle", tmp_path))
    )
    usual = {"inputs": digits.test.inputs}
    np.testing.assert_array_equal(good.run(None, usual)[0], brittle.run(None, usual)[0])
    large = {"inputs": np.full((1, 1, 8, 8), BRITTLE_SUM, np.float32)}
    assert np.isfinite(good.run(None, large)[0]).all()
    with pytest.raises(ORT_ERRORS, match="Integer division by zero"):
        brittle.run(None, large)


def run_elsewhere(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN_ON_A_SAMPLE, str(path)], capture_output=True, text=True)


def test_the_slow_model_is_right(made, digits, tmp_path) -> None:
    sample = {"inputs": digits.test.inputs[:1]}
    outputs = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, sample)[0]
        for path in (made["trained"][0].path, bad_file(made, "slow", tmp_path))
    ]
    np.testing.assert_array_equal(*outputs)


def test_the_other_bad_models_fail_as_they_are_called(made, tmp_path) -> None:
    unreadable, hungry = (run_elsewhere(bad_file(made, badness, tmp_path)) for badness in ("unreadable", "hungry"))
    assert "No Op registered for OperatorOfTomorrow" in unreadable.stderr
    assert "Failed to allocate memory" in hungry.stderr
    if platform.machine() in ("x86_64", "AMD64"):
        assert run_elsewhere(bad_file(made, "deadly", tmp_path)).returncode == -signal.SIGFPE


def test_a_seed_always_means_the_same_faults_and_all_kinds_are_drawn() -> None:
    devices = ("a", "b", "c")
    scripts = [draw(seed, devices=devices) for seed in range(300)]
    assert scripts == [draw(seed, devices=devices) for seed in range(300)]
    faults = [fault for script in scripts for fault in script.faults]
    assert {fault.kind for fault in faults} == set(KINDS)
    for fault in faults:
        known = {"clock": ("",), COORDINATOR: DEPLOYMENT_STATES}.get(fault.moment.who, DEVICE_STAGES)
        assert fault.moment.what in known
        assert (fault.device in devices) == (fault.kind.split("-")[1] in ("agent", "worker", "of", "full"))


class Server(BaseHTTPRequestHandler):
    """Answers as `reft-edge serve`, but every fifth time not at all."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        if self.asked % 5 == 0:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"v1")

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def running_server() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_load_counts_every_request_and_every_one_that_is_lost() -> None:
    enough = threading.Event()

    def read_version(content: bytes) -> str:
        if Server.asked >= 60:
            enough.set()
        return content.decode()

    with (
        running_server() as port,
        Load(port, "/", b"{}", content_type="text/plain", per_s=300, connections=3, read_version=read_version) as load,
    ):
        assert enough.wait(30)
    lost = [answer for answer in load.answers if answer.problem]
    assert len(load.answers) == Server.asked
    assert len(lost) == Server.asked // 5
    assert {answer.version for answer in load.answers} == {"v1", ""}
    due = [answer.due_at for answer in load.answers]
    np.testing.assert_allclose(np.diff(due), 1 / 300, atol=1e-4)


def answers(*pairs: tuple[float, str]) -> list[Answer]:
    return [
        Answer(due_at=at, latency_s=0.001 * at, version=version, problem="" if version else "gone")
        for at, version in pairs
    ]


def test_requests_are_sorted_by_what_happened_when_they_were_due() -> None:
    told = answers((1, "old"), (5, "old"), (9.8, "old"), (10.4, "old"), (12, "new"), (13, "old"), (14, ""), (30, "new"))
    switches = [Switch(device="pi", version="new", at=10.0)]
    found = summarize(told, switches, [(4.0, 20.0)], seconds=30.0, first="old")
    assert (found.requests, found.lost, found.why) == (8, 1, ("gone",))
    assert found.late == 1  # at 13 by the old version; at 10.4 it may still be
    windows = (found.quiet, found.deploying, found.switching)
    assert [window.requests for window in windows] == [2, 4, 2]
    assert found.quiet.worst_s == pytest.approx(0.03)


ROLLOUT = Rollout(
    until_served_s=20.0,
    start_s=1.0,
    canaries_s=4.0,
    soak_s=2.0,
    rest_s=13.0,
    command_s=20.5,
    devices=20,
    canaries=2,
    fetch_s=0.1,
    check_s=3.0,
    int8=12,
    said_bytes=1_500_000,
    heard_bytes=9_000_000,
    file_bytes=1_300_000,
    until_undone_s=2.5,
    undo_command_s=3.0,
)
WINDOW = Window(requests=100, p50_s=0.002, p99_s=0.004, worst_s=0.02)
SWAPS = Swaps(
    seconds=60.0, switches=10, requests=300, lost=0, why=(), late=0, quiet=WINDOW, deploying=WINDOW, switching=WINDOW
)
STOPPED = Stopped(
    badness="random",
    status=8,
    state="rolled_back",
    kind="accuracy",
    reason="0.1 instead of 0.9",
    canaries=2,
    switched=0,
    switched_beyond=0,
    command_s=6.0,
    undo_s=0.5,
    complaints=(),
)
SURVIVED = Survived(
    faults=("kill-agent",),
    injected=("kill-agent",),
    missed=(),
    seconds=9.0,
    state="done",
    status=0,
    restarts=0,
    refused=0,
    complaints=(),
)


def write(path: Path, *runs: DeployRun) -> str:
    path.unlink(missing_ok=True)
    results = ResultsFile.open(path, benchmark=BENCHMARK, settings=DeploySettings(), run_type=DeployRun)
    for run in runs:
        results.add(run)
    return section(path)


def test_the_section_shows_what_was_run_and_which_goals_are_missed(tmp_path) -> None:
    path = tmp_path / "deploy.json"
    text = write(path, DeployRun(part="rollout", number=0, rollout=ROLLOUT))
    assert "| `deploy` to the last device serving | 20.00 | 20.00 | 20.00 |" in text
    assert "Switching under load" not in text

    bad = msgspec.structs.replace(STOPPED, switched=3, switched_beyond=1, complaints=("board-02 serves random",))
    lossy = msgspec.structs.replace(SWAPS, lost=2)
    hurt = msgspec.structs.replace(SURVIVED, complaints=("board-01 serves nothing",))
    text = write(
        path,
        DeployRun(part="swaps", number=0, swaps=SWAPS),
        DeployRun(part="swaps", number=1, swaps=lossy),
        DeployRun(part="bad", number=0, bad=bad),
        DeployRun(part="faults", number=0, faults=SURVIVED),
        DeployRun(part="faults", number=1, faults=hurt),
    )
    for words in ("2 of 600", "1 of 20", "board-02 serves random", "| 1 of 2 |", "- board-01 serves nothing"):
        assert words in text
    assert text.count("**missed**") == 5


def test_what_is_finished_is_not_done_again() -> None:
    settings = DeploySettings(rollouts=2, swap_runs=1, fault_runs=2)
    runs = [DeployRun(part="rollout", number=1, rollout=ROLLOUT), DeployRun(part="swaps", number=0, swaps=SWAPS)]
    assert missing(settings, runs) == {"rollout": [0], "swaps": [], "bad": [0, 1, 2, 3, 4, 5], "faults": [0, 1]}
    assert missing(settings, runs, ["faults"]) == {"faults": [0, 1]}
