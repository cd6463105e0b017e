"""A constant load on one HTTP endpoint of this machine: requests that are due at fixed times, answered or not.

Requests do not wait for answers to earlier ones (up to the number of connections), and their latency counts from when
they were due: a server that stands still for a second shows as a second of late answers, not as one slow one.

Every connection is kept open, but every `_NEW_EVERY`th request goes over a new one, as from a client that comes once.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Self

from reft_edge.simulation.brokers import LOOPBACK

_NEW_EVERY = 10
_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request, and what became of it."""

    due_at: float
    """Unix time."""
    latency_s: float
    version: str
    """By which it was answered; empty when it was lost."""
    problem: str
    """Why it was lost; empty when it was not."""


class Load:
    """Begins with the block and ends with it; `answers` then has every request, in the order in which they were due.

    `read_version` takes the body of an answer apart; a `ValueError` of it makes the answer a lost one.
    """

    def __init__(
        self,
        port: int,
        path: str,
        body: bytes,
        *,
        content_type: str,
        per_s: float,
        connections: int,
        read_version: Callable[[bytes], str],
    ) -> None:
        self.answers: list[Answer] = []
        self._port = port
        self._request = (path, body, {"Content-Type": content_type})
        self._per_s = per_s
        self._read_version = read_version
        self._numbers = count()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, name=f"client-{n}") for n in range(connections)]

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._began_at = time.time()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self.answers.sort(key=lambda answer: answer.due_at)

    def _run(self) -> None:
        connection = self._connection()
        while not self._end.is_set():
            with self._lock:
                number = next(self._numbers)
            due_s = number / self._per_s
            if self._end.wait(max(0.0, self._began + due_s - time.monotonic())):
                break  # it was not sent
            if number % _NEW_EVERY == 0:
                connection.close()
            version, problem = self._ask(connection)
            latency_s = time.monotonic() - self._began - due_s
            answer = Answer(due_at=self._began_at + due_s, latency_s=latency_s, version=version, problem=problem)
            self.answers.append(answer)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> tuple[str, str]:
        """The version that answered, or what went wrong."""
        path, body, headers = self._request
        try:
            connection.request("POST", path, body=body, headers=headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != http.HTTPStatus.OK:
                return "", f"status {response.status}: {content[:200].decode(errors='replace')}"
            return self._read_version(content), ""
        except (OSError, http.client.HTTPException, ValueError) as exc:
            with contextlib.suppress(OSError):
                connection.close()
            return "", f"{type(exc).__name__}: {exc}"

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(LOOPBACK, self._port, timeout=_TIMEOUT_S)
