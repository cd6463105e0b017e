"""Serve a WSGI application on one address until it is told to stop; then finish what has begun.

The only file that knows waitress, which is written in Python, needs nothing else, and keeps slow clients away from the
threads that compute. Its loop is turned here, because its own ends at once and drops what is being answered.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask

from reft_edge.agent.serving.http_body import MAX_BODY_BYTES
from reft_edge.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    Application = Callable[[dict[str, Any], Callable[..., object]], Iterable[bytes]]

DRAIN_S = 10.0
"""How long requests that have begun may take after the order to stop. systemd kills after 20 s."""

_MAX_HEADER_BYTES = 16 * 2**10

_TURN_S = 1.0
"""The loop looks at least this often whether another version is to be loaded."""


class HttpServer:
    """Listens on `host` and `port` (0: any free one) as soon as it is made; `run` answers.

    `threads`: requests that `application` works on at a time. Raises `ResourceError` when nobody can listen there.
    """

    def __init__(self, application: Application, *, host: str, port: int, threads: int) -> None:
        listening = _listen(host, port)
        self.host, self.port = listening.getsockname()[:2]
        # Each request that waits for a thread would be a warning.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self._server: Any = create_server(
            application,
            sockets=[listening],
            threads=threads,
            ident="reft-edge",
            max_request_body_size=MAX_BODY_BYTES,
            max_request_header_size=_MAX_HEADER_BYTES,
            log_socket_errors=False,  # clients go away
            clear_untrusted_proxy_headers=True,
        )
        self._server.channel_class = _Channel
        self._is_stopping = False
        self._waking = threading.RLock()  # a signal may interrupt who holds it

    @property
    def address(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/"

    def run(self, *, each_turn: Callable[[], object] = lambda: None) -> None:
        """Answer until `stop`. `each_turn` is called now and then, and must not block."""
        while not self._is_stopping:
            self._turn(_TURN_S)
            each_turn()
        self._drain()

    def stop(self) -> None:
        """End `run`, soon; from a signal's handler or another thread, and as often as somebody likes."""
        with self._waking:
            if not self._is_stopping:
                self._is_stopping = True
                self._server.pull_trigger()

    def _turn(self, wait_s: float) -> None:
        wasyncore.loop(timeout=wait_s, map=self._server._map, count=1)

    def _drain(self) -> None:
        """Answer what has begun, and nothing new."""
        wasyncore.dispatcher.close(self._server)
        until = time.monotonic() + DRAIN_S
        self._turn(0)  # requests that have arrived already
        while self._server.active_channels and time.monotonic() < until:
            for channel in list(self._server.active_channels.values()):
                if not (channel.requests or channel.request or channel.total_outbufs_len):
                    channel.will_close = True
            self._turn(0.05)
        self._server.task_dispatcher.shutdown(timeout=max(0.0, until - time.monotonic()))
        with self._waking:  # who has ended us may not have woken us yet
            self._server.trigger.close()
        wasyncore.close_all(self._server._map)


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress ships no types
    """Answers what is no valid HTTP, or too large, as the application answers: waitress would with a text."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps({"error": f"{error.reason}: {error.body}"}).encode() + b"\n"
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = _JsonErrorTask


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as exc:
        reason = exc.strerror or exc
        raise ResourceError(f"nobody can listen at {host}:{port}: {reason}; name another --host or --port") from exc
    return listening
