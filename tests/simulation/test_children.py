"""Children never outlive us, whatever they or we do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reft_edge.simulation import children as module
from reft_edge.simulation.children import Children

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import time; print('up', flush=True); time.sleep(600)"
grandchild = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
grandchild.stdout.readline()
print(grandchild.pid, flush=True)
time.sleep(600)
"""


def gone(pid):
    """Whether the process has ended; a zombie whose parent has not asked counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail("it did not happen in time")
        time.sleep(0.02)  # between two looks at other processes, which send no event


def test_a_child_that_ignores_sigterm_and_its_grandchild_are_gone_after_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.3)
    with Children() as children:
        child = children.start(
            "stubborn",
            [sys.executable, "-c", STUBBORN],
            log_path=tmp_path / "log",
            directory=tmp_path,
            read_output=True,
        )
        grandchild = int(child.output.readline())
    assert child.status == -signal.SIGKILL
    wait_until(lambda: gone(grandchild))


def test_a_failure_is_one_line_with_the_last_words_and_the_log(tmp_path):
    code = "import sys; print('all was well'); print('boom: out of luck', file=sys.stderr); sys.exit(3)"
    with Children() as children:
        child = children.start("agent x", [sys.executable, "-c", code], log_path=tmp_path / "log", directory=tmp_path)
        child.process.wait(20)
        assert children.failed() is child
        assert child.obituary() == f"agent x ended with 3: boom: out of luck (log: {tmp_path / 'log'})"
    assert "all was well" in (tmp_path / "log").read_text()


def test_an_orderly_end_is_no_failure(tmp_path):
    with Children() as children:
        child = children.start("x", [sys.executable, "-c", ""], log_path=tmp_path / "log", directory=tmp_path)
        assert child.process.wait(20) == 0
        assert children.failed() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent died")
def test_a_child_ends_when_we_are_killed(tmp_path):
    code = f"""
import pathlib, sys, time
from reft_edge.simulation.children import Children
child = Children().start("x", [sys.executable, "-c", "import time; time.sleep(600)"],
    log_path=pathlib.Path({str(tmp_path / "log")!r}), directory=pathlib.Path({str(tmp_path)!r}))
print(child.process.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: gone(pid))
