"""A link that loses, repeats and reorders packets, made of namespaces that vanish with their last process."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from reft_edge.simulation.links.tunnel import TunnelLink, TunnelShape, available

pytestmark = pytest.mark.skipif(available() is not None, reason=f"no tunnel: {available()}")

RECEIVE = """
import socket, sys
with socket.create_server((sys.argv[1], 4000)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    n_bytes = 0
    while data := connection.recv(65536):
        n_bytes += len(data)
    print(n_bytes, flush=True)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 4000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""
HOLD = """
import sys
from reft_edge.simulation.links.tunnel import TunnelLink, TunnelShape
with TunnelLink(TunnelShape()) as link:
    print(link._relay.pid, flush=True)
    sys.stdin.read()
"""


def test_tcp_gets_through_what_it_can_do_to_packets() -> None:
    shape = TunnelShape(delay_s=0.01, bytes_per_s=2e6, loss=0.02, duplicate=0.02, reorder=0.02, seed=1)
    with TunnelLink(shape) as link:
        command = link.command(1, [sys.executable, "-c", RECEIVE, link.address(1)])
        with subprocess.Popen(command, stdout=subprocess.PIPE) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == b"listening\n"
            send = link.command(0, [sys.executable, "-c", SEND, link.address(1), "400000"])
            subprocess.run(send, check=True, timeout=60)
            assert receiver.stdout.readline() == b"400000\n"
        counters = link.counters()
    assert counters.n_bytes[0] > 400_000
    assert counters.lost[0] > 0


def test_a_ping_takes_the_delay_twice() -> None:
    with TunnelLink(TunnelShape(delay_s=0.1)) as link:
        command = link.command(1, [sys.executable, "-c", RECEIVE, link.address(1)])
        with subprocess.Popen(command, stdout=subprocess.PIPE) as receiver:
            assert receiver.stdout is not None
            receiver.stdout.readline()
            began = time.monotonic()
            subprocess.run(link.command(0, [sys.executable, "-c", SEND, link.address(1), "1"]), check=True, timeout=60)
            assert time.monotonic() - began >= 0.2  # the handshake alone
            assert receiver.stdout.readline() == b"1\n"


def test_nothing_is_left_when_its_owner_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        relay = os.pidfd_open(int(owner.stdout.readline()))
        try:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            poll = select.poll()
            poll.register(relay, select.POLLIN)
            assert poll.poll(10_000), "the relay outlives its owner"
        finally:
            os.close(relay)


def test_its_devices_are_seen_inside_only() -> None:
    look = ["ip", "link", "show", "dev", "reft0"]
    with TunnelLink(TunnelShape()) as link:
        for command, seen in ((link.command(0, look), True), (link.command(1, look), True), (look, False)):
            assert (subprocess.run(command, capture_output=True, check=False).returncode == 0) is seen
