"""The proxy passes bytes unchanged, at the pace it was told, and breaks connections in the two ways networks do."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from reft_edge.simulation.links.lane import QUEUE_BYTES, Lane
from reft_edge.simulation.links.tcp_proxy import TcpProxy


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets, and closes when its peer does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve_echo, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def serve_echo(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=echo_until_closed, args=(connection,), daemon=True).start()


def echo_until_closed(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            return


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=10)


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send `data` and read as many bytes back."""
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    received = bytearray()
    while len(received) < len(data):
        piece = sock.recv(65536)
        assert piece, "the connection ended"
        received += piece
    sender.join(10)
    return bytes(received)


def test_bytes_pass_unchanged_and_are_counted_each_way(echo: int) -> None:
    data = bytes(range(256)) * 4096
    with TcpProxy("127.0.0.1", echo) as proxy, connect(proxy) as sock:
        assert exchange(sock, data) == data
        assert (proxy.bytes_up, proxy.bytes_down) == (len(data), len(data))
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


def test_a_cut_resets_and_refuses_until_it_is_restored_on_the_same_port(echo: int) -> None:
    with TcpProxy("127.0.0.1", echo) as proxy:
        with connect(proxy) as sock:
            assert exchange(sock, b"before") == b"before"
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        proxy.restore()
        with connect(proxy) as sock:
            assert exchange(sock, b"after") == b"after"


def test_a_frozen_link_says_nothing_and_loses_nothing(echo: int) -> None:
    with TcpProxy("127.0.0.1", echo) as proxy, connect(proxy) as sock:
        assert exchange(sock, b"before") == b"before"
        proxy.freeze()
        sock.sendall(b"meanwhile")
        assert not select.select([sock], [], [], 0.2)[0]
        proxy.thaw()
        assert sock.recv(100) == b"meanwhile"


def test_delay_and_rate_are_kept_in_both_directions(echo: int) -> None:
    data = bytes(100_000)
    with TcpProxy("127.0.0.1", echo, delay_s=0.1, bytes_per_s=400_000) as proxy, connect(proxy) as sock:
        began = time.monotonic()
        assert exchange(sock, data) == data
        assert time.monotonic() - began >= 2 * 0.1 + 100_000 / 400_000
        proxy.shape(delay_s=0.0, bytes_per_s=None)
        assert exchange(sock, data) == data


def test_a_reader_that_stops_reading_stops_the_writer(echo: int) -> None:
    with TcpProxy("127.0.0.1", echo) as proxy, connect(proxy) as sock:
        sock.setblocking(False)
        n_sent = 0
        while select.select([], [sock], [], 1.0)[1]:
            n_sent += sock.send(bytes(65536))
            assert n_sent < 64 * 2**20, "the proxy takes bytes without end"
        assert proxy.n_connections == 1


def test_a_target_that_is_away_looks_like_a_reset_and_not_like_a_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with TcpProxy("127.0.0.1", port) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as sock:
        sock.recv(1)


def test_a_lane_sends_one_thing_after_the_other_and_then_delays_it() -> None:
    lane = Lane(delay_s=0.5, bytes_per_s=1000.0)
    assert lane.enter(1000, 10.0) == 11.5
    assert lane.enter(500, 10.0) == 12.0
    assert lane.enter(100, 20.0) == pytest.approx(20.6)
    lane.enter(2 * QUEUE_BYTES, 30.0)
    assert lane.open_at(30.0) == pytest.approx(30.0 + QUEUE_BYTES / 1000)
    assert lane.n_bytes == 1600 + 2 * QUEUE_BYTES
