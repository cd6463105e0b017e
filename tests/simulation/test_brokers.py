"""Brokers as child processes: they start, restart, report why they cannot, and never outlive their parent."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reft_edge.errors import BrokerError
from reft_edge.simulation.brokers import RunningBroker, choose_kind, start_broker

START_AND_HOLD = """
import sys
from pathlib import Path
from reft_edge.simulation.brokers import start_broker
broker = start_broker(sys.argv[1], directory=Path(sys.argv[2]))
print(broker._process.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_broker_starts_again_on_its_port(own_broker: RunningBroker) -> None:
    address = own_broker.address
    own_broker.kill()
    assert not own_broker.running
    own_broker.start()
    assert own_broker.running
    assert own_broker.address == address
    own_broker.stop()
    own_broker.stop()
    assert not own_broker.running


def test_a_broker_dies_with_its_parent(own_broker: RunningBroker, tmp_path: Path) -> None:
    command = [sys.executable, "-c", START_AND_HOLD, own_broker.kind, str(tmp_path / "held")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        descriptor = os.pidfd_open(pid)
        try:
            parent.kill()
            parent.wait()
            wait_for_end(descriptor)
        finally:
            os.close(descriptor)


def wait_for_end(descriptor: int) -> None:
    """Wait until the process, which is not our child, has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(10_000), "the broker outlives its parent"


def test_what_is_not_installed_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_edge.simulation.brokers.find_mosquitto", lambda: None)
    assert choose_kind("auto") == "embedded"
    with pytest.raises(BrokerError, match="apt install mosquitto"):
        choose_kind("mosquitto")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BrokerError, match="pip install amqtt"):
        choose_kind("embedded")
    with pytest.raises(BrokerError, match="neither"):
        choose_kind("auto")


@pytest.mark.mosquitto
@pytest.mark.usefixtures("mosquitto_program")
def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "mosquitto.db").write_bytes(b"not a database")
    with pytest.raises(BrokerError, match="does not start"):
        start_broker("mosquitto", directory=tmp_path)


@pytest.mark.parametrize(
    "options", [{"port": 70_000}, {"bind": "no-such-host.invalid"}, {"bind": "8.8.8.8"}, {"directory": Path("/proc/x")}]
)
def test_where_it_cannot_listen_or_write_is_one_clear_line(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="cannot"):
        start_broker("embedded", **{"directory": tmp_path, **options})  # type: ignore[arg-type]


def test_the_command_serves_until_it_is_asked_to_stop(own_broker: RunningBroker) -> None:
    own_broker.stop()
    command = [sys.executable, "-m", "reft_edge", "broker", "--kind", own_broker.kind, "--port", str(own_broker.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert (
            process.stdout.readline()
            == f"{own_broker.kind} broker listens on {own_broker.address}; stop it with Ctrl-C\n".encode()
        )
        second = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert (second.returncode, second.stdout) == (BrokerError.exit_code, b"")
        assert b"cannot listen" in second.stderr
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"broker stopped\n")
