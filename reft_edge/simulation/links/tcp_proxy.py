"""A TCP link that can be slow, far, cut or silent: a proxy in front of a broker.

Works for plain bytes and for TLS, which it does not open. `cut` is what a router that restarts does: connections are
reset, new ones refused, what was on its way is lost. `freeze` is a pulled cable: nobody is told anything, and peers
find out by their own timeouts. One thread; meant for a few dozen connections.

What it cannot do is lose packets, because TCP would notice; `simulation.links.tunnel` does.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from reft_edge.errors import LocalProtocolError, RemoteProtocolError
from reft_edge.simulation.links.conversation import Conversation, Direction, Unchanged
from reft_edge.simulation.links.lane import Lane

_SOCKET_BUFFER_BYTES = 64 * 1024
"""For the kernel's buffers on our side. Its own choice is megabytes, in which a slow link would vanish."""

_MAX_HELD_BYTES = 256 * 1024
"""Beyond this a connection is not read further until its other end takes something: a slow reader slows the writer."""

_MAX_TRAVELLING_BYTES = 4 * 2**20
"""The same where bytes travel for a while."""

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 10.0
_LINGER_RESET = struct.pack("ii", 1, 0)

_log = logging.getLogger(__name__)


class TcpProxy:
    """Listens on `port` of loopback (0: any free one) and connects each client to the target.

    `delay_s` and `bytes_per_s` hold for each direction; all connections share the rate. Start it with `with`, or with
    `start` and `stop`.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        *,
        port: int = 0,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
    ) -> None:
        self._target = (target_host, target_port)
        self._port = port
        self._lanes = {direction: Lane(delay_s=delay_s, bytes_per_s=bytes_per_s) for direction in Direction}
        self._listener: socket.socket | None = None
        self._connections: list[_Connection] = []
        self._frozen = False
        self._stopping = False
        self._commands: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._wake_sockets: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def host(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        """Where to connect; the same before and after a cut."""
        return self._port

    @property
    def bytes_up(self) -> int:
        """What clients have put on the link, also if it never arrived."""
        return self._lanes[Direction.UP].n_bytes

    @property
    def bytes_down(self) -> int:
        """What the target has put on the link, also if it never arrived."""
        return self._lanes[Direction.DOWN].n_bytes

    @property
    def n_connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    def start(self) -> None:
        if self._thread is not None:
            raise LocalProtocolError("a proxy is started once; make a new one")
        self._listen()
        self._wake_sockets = socket.socketpair()
        for sock in self._wake_sockets:
            sock.setblocking(False)
        self._thread = threading.Thread(
            target=self._run, args=(self._wake_sockets[1],), name=f"proxy-{self._port}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Reset all connections and end. Idempotent."""
        if self._thread is None or self._stopping:
            return
        self._do(self._end)
        self._thread.join(_ANSWER_TIMEOUT_S)
        for sock in self._wake_sockets or ():
            sock.close()

    def shape(self, *, delay_s: float, bytes_per_s: float | None) -> None:
        """Change the link, for what enters it from now on."""
        for lane in self._lanes.values():
            lane.delay_s, lane.bytes_per_s = delay_s, bytes_per_s
        self._do(_nothing)

    def cut(self) -> None:
        """Reset all connections and refuse new ones. What is on its way is lost. Idempotent."""
        self._do(self._cut)

    def restore(self) -> None:
        """Accept connections again. Idempotent."""
        self._do(self._listen)

    def freeze(self) -> None:
        """Hold everything back, and say nothing: neither bytes nor the end of a connection get through. Idempotent."""
        self._do(lambda: self._set_frozen(True))

    def thaw(self) -> None:
        """Let go on what was held back. Idempotent."""
        self._do(lambda: self._set_frozen(False))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _converse(self) -> Conversation:
        """What happens to the bytes of a new connection."""
        return Unchanged()

    # In the caller's thread.

    def _do(self, command: Callable[[], None]) -> None:
        """Have the proxy's thread run `command`, and wait until it has."""
        if self._wake_sockets is None or self._stopping:
            raise LocalProtocolError("the proxy does not run")
        done = threading.Event()
        self._commands.put((command, done))
        with contextlib.suppress(BlockingIOError):  # then it has enough to wake up for
            self._wake_sockets[0].send(b"\0")
        if not done.wait(_ANSWER_TIMEOUT_S):
            raise LocalProtocolError("the proxy's thread does not answer; it may be connecting to a silent target")

    # In the proxy's thread.

    def _run(self, wake: socket.socket) -> None:
        while not self._stopping:
            self._wait(wake)
            while not self._commands.empty():
                command, done = self._commands.get()
                command()
                done.set()
            if not self._frozen:
                self._accept()
                now = time.monotonic()
                for connection in self._connections:
                    connection.step(now)
                self._connections = [connection for connection in self._connections if not connection.ended]

    def _wait(self, wake: socket.socket) -> None:
        """Until a socket can be served, bytes have arrived at the end of the link, or a command came."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        wake_up_at = None
        if not self._frozen:
            now = time.monotonic()
            if self._listener is not None:
                poll.register(self._listener, select.POLLIN)
            times = []
            for connection in self._connections:
                times += connection.register(poll, now)
            wake_up_at = min(times, default=None)
        poll.poll(None if wake_up_at is None else max(0.0, wake_up_at - time.monotonic()) * 1000)
        try:
            while wake.recv(4096):
                pass
        except BlockingIOError:
            return

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        target = socket.socket(socket.AF_INET)
        try:
            target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
            target.settimeout(_CONNECT_TIMEOUT_S)
            target.connect(self._target)
        except OSError as exc:
            _log.debug("target %s:%d: %s", *self._target, exc)
            _reset(client)
            target.close()
            return
        self._connections.append(_Connection(client, target, self._converse(), self._lanes))

    def _listen(self) -> None:
        if self._listener is not None:
            return
        listener = socket.socket(socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)  # accepted ones inherit it
        listener.setblocking(False)
        listener.bind((self.host, self._port))
        listener.listen()
        self._port = listener.getsockname()[1]
        self._listener = listener

    def _cut(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in self._connections:
            connection.reset()
        self._connections.clear()

    def _set_frozen(self, frozen: bool) -> None:
        self._frozen = frozen

    def _end(self) -> None:
        self._cut()
        self._stopping = True


class _Connection:
    """A client, its target, and a pipe each way."""

    def __init__(
        self, client: socket.socket, target: socket.socket, conversation: Conversation, lanes: dict[Direction, Lane]
    ) -> None:
        for sock in (client, target):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        self._conversation = conversation
        self._pipes = {
            Direction.UP: _Pipe(client, target, lanes[Direction.UP]),
            Direction.DOWN: _Pipe(target, client, lanes[Direction.DOWN]),
        }
        self.ended = False

    def register(self, poll: select.poll, now: float) -> list[float]:
        """Say what this connection waits for: events of its sockets, and times."""
        flags: dict[socket.socket, int] = {}
        times = []
        for pipe in self._pipes.values():
            times += pipe.wishes(flags, now)
        for sock, wanted in flags.items():
            poll.register(sock, wanted)
        if (release := self._conversation.next_release()) is not None:
            times.append(release)
        return times

    def step(self, now: float) -> None:
        """Read, change and write what is possible."""
        try:
            for direction, pipe in self._pipes.items():
                if data := pipe.read(now):
                    self._conversation.feed(direction, data, now)
                if pipe.at_end:
                    self._conversation.end(direction)
            for direction, pipe in self._pipes.items():
                pipe.hold(self._conversation.take(direction, now), now)
                pipe.write(now)
        except (OSError, RemoteProtocolError) as exc:
            _log.debug("connection ends: %s", exc)
            self.reset()
            return
        if all(pipe.finished for pipe in self._pipes.values()):
            self._close()

    def reset(self) -> None:
        """End it so that both peers see an error."""
        for pipe in self._pipes.values():
            _reset(pipe.source)
        self.ended = True

    def _close(self) -> None:
        for pipe in self._pipes.values():
            pipe.source.close()
        self.ended = True


class _Pipe:
    """One direction of a connection: bytes with the time of their arrival."""

    def __init__(self, source: socket.socket, sink: socket.socket, lane: Lane) -> None:
        self.source = source
        self._sink = sink
        self._lane = lane
        self._travelling: deque[tuple[float, bytes]] = deque()
        self._n_held = 0
        self.at_end = False
        self.finished = False

    def wishes(self, flags: dict[socket.socket, int], now: float) -> list[float]:
        """Add the events that this pipe waits for to `flags`; returns the times that it waits for."""
        times = []
        if self._may_read():
            if (open_at := self._lane.open_at(now)) <= now:
                flags[self.source] = flags.get(self.source, 0) | select.POLLIN
            else:
                times.append(open_at)
        if self._travelling:
            if (arrival := self._travelling[0][0]) <= now:
                flags[self._sink] = flags.get(self._sink, 0) | select.POLLOUT
            else:
                times.append(arrival)
        return times

    def read(self, now: float) -> bytes:
        """What the source has to say, as far as the link takes it. Raises `OSError` when the source is gone."""
        if not self._may_read() or self._lane.open_at(now) > now:
            return b""
        try:
            data = self.source.recv(self._lane.piece_bytes)
        except BlockingIOError:
            return b""
        self.at_end = not data
        return data

    def hold(self, data: bytes, now: float) -> None:
        """Put bytes on the link."""
        step = self._lane.piece_bytes
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            self._travelling.append((self._lane.enter(len(piece), now), piece))
        self._n_held += len(data)

    def write(self, now: float) -> None:
        """Hand over what has arrived, and then the end. Raises `OSError` when the sink is gone."""
        try:
            while self._travelling and self._travelling[0][0] <= now:
                arrival, data = self._travelling[0]
                n_sent = self._sink.send(data)
                self._n_held -= n_sent
                if n_sent < len(data):
                    self._travelling[0] = (arrival, data[n_sent:])
                else:
                    self._travelling.popleft()
        except BlockingIOError:
            return
        if self.at_end and not self._travelling and not self.finished:
            self.finished = True
            self._sink.shutdown(socket.SHUT_WR)

    def _may_read(self) -> bool:
        limit = _MAX_TRAVELLING_BYTES if self._lane.delay_s > 0 else _MAX_HELD_BYTES
        return not self.at_end and self._n_held < limit


def _reset(sock: socket.socket) -> None:
    """Close so that the peer gets an error, and nothing that waits is sent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


def _nothing() -> None:
    """A command that only wakes the thread."""
