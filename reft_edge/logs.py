"""Log lines of every command: as text for people, or one JSON object a line for programs, on standard error.

A line says what it is about, as far as that is known: the device, the round, the task. An agent is about one device for
as long as it lives and about one task at a time (`process_is_about`); a coordinator turns from one device to the next
(`about`, for the length of a block). Whoever logs does not need to know: the formatter adds it.

JSON has the keys time (ISO 8601, UTC), level, logger and message, and of device, round, task and exception those that
are known. Only entry points call `configure`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, NamedTuple, TypeAlias, get_args

LogFormat: TypeAlias = Literal["text", "json"]

LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

_PACKAGE = "reft_edge"

_log = logging.getLogger(__name__)


class Subject(NamedTuple):
    """What a line is about. Empty or None: not known, or nothing in particular."""

    device: str = ""
    round: int | None = None
    task: str = ""

    def over(self, wider: Subject) -> Subject:
        """This one, with what it does not say from a wider one."""
        number = wider.round if self.round is None else self.round
        return Subject(device=self.device or wider.device, round=number, task=self.task or wider.task)


_NOTHING = Subject()
_here: ContextVar[Subject] = ContextVar("subject", default=_NOTHING)


class _Process:
    """What holds for the whole process, its threads included."""

    format: LogFormat = "text"
    subject = _NOTHING


def configure(log_format: LogFormat, level: int) -> None:
    """Log from `level` up; libraries from warnings up: torch traces every operator for debugging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger(_PACKAGE).setLevel(level)
    _Process.format = log_format
    if log_format == "json":
        sys.excepthook = _log_crash


def say(line: str) -> None:
    """Tell whoever started the command, on standard error: a bare line, or among the log lines where these are JSON."""
    if _Process.format == "json":
        _log.info("%s", line)
    else:
        print(line, file=sys.stderr)


def chosen_format() -> LogFormat:
    """As this process was configured; for a child that shall log alike."""
    return _Process.format


def process_is_about(subject: Subject) -> None:
    """From now on, in every thread."""
    _Process.subject = subject


@contextlib.contextmanager
def about(*, device: str = "", round: int | None = None, task: str = "") -> Iterator[None]:  # noqa: A002  the field's name
    """Lines of this thread within the block are about this, and about what they were about before."""
    token = _here.set(Subject(device, round, task).over(_here.get()))
    try:
        yield
    finally:
        _here.reset(token)


def _subject() -> Subject:
    return _here.get().over(_Process.subject)


class TextFormatter(logging.Formatter):
    """Time, level, logger, message; then round and task where the message does not name them."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """One line, without an exception's lines, which follow it."""
        subject = _subject()
        words = [f"round {subject.round}"] if subject.round is not None else []
        words += [f"task {subject.task}"] if subject.task else []
        missing = ", ".join(word for word in words if word not in record.message)
        line = super().formatMessage(record)
        return f"{line} [{missing}]" if missing else line


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, str | int] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in _subject()._asdict().items() if value not in ("", None)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _log_crash(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    """In place of Python's own traceback, which is many lines and no JSON."""
    _log.critical("ended by an error of its own: %s", exc, exc_info=(kind, exc, trace))
