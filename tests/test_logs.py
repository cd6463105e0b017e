"""A log line says what it is about, and as JSON it is one object whatever happens."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_edge import logs
from reft_edge.logs import JsonFormatter, Subject, TextFormatter, about, process_is_about

TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z")


class Lines:
    """A logger of its own, and what it wrote in both forms."""

    def __init__(self) -> None:
        self.logger = logging.Logger("reft_edge.somewhere")
        self._streams = {}
        for form in (TextFormatter(), JsonFormatter()):
            stream = io.StringIO()
            handler = logging.StreamHandler(stream)
            handler.setFormatter(form)
            self.logger.addHandler(handler)
            self._streams[type(form)] = stream

    def text(self) -> list[str]:
        """Without the time; nothing remains of lines that do not begin with one."""
        return [
            line.partition(",")[2].partition(" ")[2] for line in self._streams[TextFormatter].getvalue().splitlines()
        ]

    def objects(self) -> list[dict[str, str | int]]:
        return [json.loads(line) for line in self._streams[JsonFormatter].getvalue().splitlines()]


@pytest.fixture
def lines() -> Iterator[Lines]:
    process_is_about(Subject())  # commands that other tests ran in this process have said what it is about
    yield Lines()
    process_is_about(Subject())


def test_a_line_about_nothing_in_particular_says_no_more_than_what_was_said(lines: Lines) -> None:
    lines.logger.warning("%d devices", 3)
    assert lines.text() == ["WARNING reft_edge.somewhere: 3 devices"]
    (line,) = lines.objects()
    assert TIME.fullmatch(str(line.pop("time")))
    assert line == {"level": "WARNING", "logger": "reft_edge.somewhere", "message": "3 devices"}


def test_what_holds_for_the_process_holds_in_every_thread_and_for_a_block_in_its_own(lines: Lines) -> None:
    process_is_about(Subject(device="pi-1"))
    with about(round=2, task="r2-pi-1"):
        lines.logger.info("here")
        thread = threading.Thread(target=lines.logger.info, args=("there",))
        thread.start()
        thread.join()
    lines.logger.info("later")
    assert [(line["device"], line.get("round"), line.get("task")) for line in lines.objects()] == [
        ("pi-1", 2, "r2-pi-1"),
        ("pi-1", None, None),
        ("pi-1", None, None),
    ]
    assert lines.text()[0] == "INFO reft_edge.somewhere: here [round 2, task r2-pi-1]"


def test_an_inner_block_adds_to_the_outer_one_and_ends_with_an_error(lines: Lines) -> None:
    with about(round=0):
        with pytest.raises(KeyError), about(device="pi-2", task="t"):
            raise KeyError(lines.logger.info("inner"))
        lines.logger.info("outer")
    inner, outer = lines.objects()
    assert (inner["device"], inner["round"], inner["task"]) == ("pi-2", 0, "t")
    assert (outer["round"], "device" in outer, "task" in outer) == (0, False, False)


def test_text_does_not_repeat_what_the_message_names(lines: Lines) -> None:
    with about(round=2, task="r2-pi-1"):
        lines.logger.info("task r2-pi-1: accepted")
        lines.logger.info("round 2: no quorum yet")
    assert [line.partition(": ")[2] for line in lines.text()] == [
        "task r2-pi-1: accepted [round 2]",
        "round 2: no quorum yet [task r2-pi-1]",
    ]


def test_an_exception_is_text_in_one_object_and_lines_for_people(lines: Lines) -> None:
    try:
        raise ValueError("line\nbreak, and ünïcode")
    except ValueError:
        with about(round=1):
            lines.logger.exception("it failed")
    (line,) = lines.objects()
    assert str(line["exception"]).startswith("Traceback")
    assert str(line["exception"]).endswith("ValueError: line\nbreak, and ünïcode")
    assert lines.text()[0] == "ERROR reft_edge.somewhere: it failed [round 1]"


def run(*arguments: str, code: str = "from reft_edge.cli.main import entry_point; entry_point()") -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode
    return done.stderr


def test_a_users_mistake_is_a_line_of_the_chosen_form(tmp_path: Path) -> None:
    missing = str(tmp_path / "agent.toml")
    text = run("agent", missing)
    assert text.startswith("reft-edge agent: error: ")
    (line,) = map(json.loads, run("agent", missing, "--log-format", "json").splitlines())
    assert (line["level"], line["logger"]) == ("ERROR", "reft_edge.cli.main")
    assert line["message"] == text.removeprefix("reft-edge agent: error: ").rstrip("\n")


def test_an_error_of_our_own_is_one_object_too() -> None:
    code = "from reft_edge import logs; logs.configure('json', 20); logs.process_is_about(logs.Subject('pi-1')); 1 / 0"
    (line,) = map(json.loads, run(code=code).splitlines())
    assert (line["level"], line["device"]) == ("CRITICAL", "pi-1")
    assert "ZeroDivisionError" in line["exception"]


def test_libraries_are_heard_from_warnings_up_and_we_as_was_chosen() -> None:
    code = """
import logging, sys
from reft_edge import logs
logs.configure("json", logging.DEBUG)
logging.getLogger("torch").info("traced an operator")
logging.getLogger("torch").warning("slow")
logging.getLogger("reft_edge.agent").debug("a detail")
sys.exit(1)
"""
    assert [json.loads(line)["message"] for line in run(code=code).splitlines()] == ["slow", "a detail"]


def test_a_child_can_be_told_to_log_alike() -> None:
    code = "import sys; from reft_edge import logs; logs.configure('json', 20); sys.exit(logs.chosen_format())"
    assert run(code=code).strip() == "json"
    assert logs.chosen_format() == "text"
