"""`serve` as a process: it says where it is, follows a deployment, and ends when it is told to."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reft_edge.agent.serving.counts import read_counts
from reft_edge.cli.main import main
from tests.agent.serving.onnx_files import linear_onnx, serve, write_agent_toml

BODY = b'{"inputs": [[1, 2]]}'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(source: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    command = [sys.executable, "-m", "reft_edge", "serve", str(source), "--json", "--port", str(free_port()), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            if process.poll() is None:
                process.kill()


def ask(address: str, path: str, body: bytes | None = None) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(address + path, data=body, timeout=60) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.loads(exc.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_follows_what_is_deployed_counts_if_allowed_and_ends_cleanly(tmp_path, number):
    spool = tmp_path / "spool"
    (spool / "serving").mkdir(parents=True)
    with serving(write_agent_toml(tmp_path, serving="report = true")) as (process, address):
        assert ask(address, "health")[0] == 503
        serve(spool, "v1", linear_onnx([0, 1], shape=(2,)), classes=("off", "on"))
        assert ask(address, "predict", BODY)[1]["predictions"][0]["label"] == "on"
        serve(spool, "v2", linear_onnx([1, 0], shape=(2,)), classes=("off", "on"))
        while (found := ask(address, "predict", BODY))[1]["version"] == "v1":
            assert found[0] == 200
        assert found[1]["predictions"][0]["label"] == "off"
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    counts = read_counts(spool / "serving" / "counts", "roll-out-of-v2", "v2")
    assert counts is not None
    assert (counts.predictions, counts.classes) == (1, (1,))


def test_listening_for_others_is_warned_of(tmp_path):
    (tmp_path / "m.onnx").write_bytes(linear_onnx([0, 1], shape=(2,)))
    with serving(tmp_path / "m.onnx", "--host", "0.0.0.0") as (process, address):
        port = address.rstrip("/").rpartition(":")[2]
        assert ask(f"http://127.0.0.1:{port}/", "health")[0] == 200
        process.terminate()
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "there is no password" in process.stderr.read()


def test_a_port_that_is_taken_is_one_line(tmp_path, capsys):
    (tmp_path / "m.onnx").write_bytes(linear_onnx([0, 1], shape=(2,)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path / "m.onnx"), "--port", port]) == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert f"nobody can listen at 127.0.0.1:{port}" in line
