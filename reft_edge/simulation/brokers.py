"""A broker on this machine, for the demo, for tests and for trying out: Mosquitto where it is installed, else amqtt.

Both run as a child process on loopback, and end with their parent. They ask nobody for a password and encrypt nothing,
unless Mosquitto is started with a configuration that `reft-edge provision` wrote. For a fleet, run that as a service.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

from reft_edge.errors import BrokerError
from reft_edge.simulation.children import end_with_parent
from reft_edge.wire.endpoint import BrokerSettings

BrokerKind: TypeAlias = Literal["mosquitto", "embedded"]

LOOPBACK = "127.0.0.1"

START_TIMEOUT_S = 20.0
"""amqtt imports for a second; a board under load takes ten times as long."""

_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.02
_PORT_ATTEMPTS = 3
"""A free port is found by asking the kernel; until the broker takes it, somebody else may."""

_MOSQUITTO_CONFIGURATION = """\
listener {port} {bind}
allow_anonymous true
persistence true
persistence_location {directory}/
autosave_interval 10
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages false
set_tcp_nodelay true
max_packet_size 131072
max_inflight_messages 8
max_queued_messages 500
max_queued_bytes 8388608
queue_qos0_messages false
persistent_client_expiration 1d
"""
"""The limits are those of the fleet's configuration, so that what works here works there.

Persistence: sessions and retained messages of up to 10 s before a kill survive it.
"""


def find_mosquitto() -> str | None:
    """Path of the mosquitto program; distributions put it where users' PATH does not look."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def choose_kind(kind: Literal["auto", "mosquitto", "embedded"]) -> BrokerKind:
    """What `auto` means here. Raises `BrokerError` when the wanted broker is not installed."""
    if kind != "embedded" and find_mosquitto() is not None:
        return "mosquitto"
    if kind == "mosquitto":
        raise BrokerError("mosquitto is not installed; install it (apt install mosquitto) or use the embedded broker")
    if importlib.util.find_spec("amqtt") is None:
        wanted = "the embedded broker needs amqtt" if kind == "embedded" else "neither mosquitto nor amqtt is installed"
        raise BrokerError(f"{wanted}; install one: apt install mosquitto, or pip install amqtt")
    return "embedded"


class RunningBroker:
    """A broker child process. As a context manager it stops at the end of the block.

    `configuration`: a file for Mosquitto, instead of one that we write for trying out.
    """

    def __init__(
        self, kind: BrokerKind, *, directory: Path, host: str, port: int, configuration: Path | None = None
    ) -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self.log_path = directory / "broker.log"
        self._directory = directory
        self._configuration = configuration
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def settings(self) -> BrokerSettings:
        """How to connect to it, without trying out which version of MQTT it speaks."""
        return BrokerSettings(host=self.host, port=self.port, mqtt_version="5" if self.kind == "mosquitto" else "3.1.1")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """None unless it runs (or is stopped)."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start, also again after `stop` or `kill`, on the same port. Raises `BrokerError` unless it then accepts."""
        if self.running:
            return
        _listen_once(self.host, self.port)  # else the reason would be in the broker's log only
        command = self._mosquitto_command() if self.kind == "mosquitto" else self._embedded_command()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, preexec_fn=end_with_parent()
            )
        self._wait_until_accepting()

    def stop(self) -> None:
        """Ask it to end, insist after a while. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Exit status once the process has ended; None after `timeout_s`."""
        if self._process is None:
            return 0
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self) -> RunningBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _mosquitto_command(self) -> list[str]:
        program = find_mosquitto()
        if program is None:
            raise BrokerError("mosquitto is not installed any more")
        return [program, "-c", str(self._configuration or self._write_configuration())]

    def _write_configuration(self) -> Path:
        text = _MOSQUITTO_CONFIGURATION.format(port=self.port, bind=self.host, directory=self._directory)
        path = self._directory / "mosquitto.conf"
        path.write_text(_as_this_user(text), encoding="utf-8")
        return path

    def _embedded_command(self) -> list[str]:
        return [sys.executable, "-m", "reft_edge.simulation.embedded_broker", self.host, str(self.port)]

    def _wait_until_accepting(self) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if not self.running:
                break
            try:
                with socket.create_connection((self.host, self.port), timeout=1.0):
                    return
            except OSError:
                time.sleep(_POLL_S)
        self.kill()
        raise BrokerError(f"{self.kind} broker on {self.address} does not start: {self._last_words()}")

    def _last_words(self) -> str:
        text = self.log_path.read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1][:500] if text else f"see {self.log_path}"


def start_broker(
    kind: Literal["auto", "mosquitto", "embedded"] = "auto",
    *,
    directory: Path,
    port: int = 0,
    bind: str = LOOPBACK,
) -> RunningBroker:
    """Start a broker whose files and log are in `directory`, which is created. Port 0: any free one.

    Call it from a thread that lives as long as the broker should: Linux ends the child with that thread. Raises
    `BrokerError` when no broker is installed, the port is taken, or it does not accept within `START_TIMEOUT_S`.
    """
    chosen = choose_kind(kind)
    _make(directory)
    attempts = _PORT_ATTEMPTS if port == 0 else 1
    for attempt in range(attempts):
        broker = RunningBroker(chosen, directory=directory.resolve(), host=bind, port=port or _listen_once(bind, 0))
        try:
            broker.start()
        except BrokerError:
            if attempt == attempts - 1:
                raise
        else:
            return broker
    raise BrokerError("no free port was found")  # unreachable: the last attempt raises


def start_provisioned_broker(configuration: Path, *, directory: Path, port: int) -> RunningBroker:
    """Start the Mosquitto of a provisioning directory; its log is in `directory`, which is created.

    Its `configuration`, which names `port` and all that the broker needs, is changed: to listen on loopback only, and
    to run as the user that we are. Raises `BrokerError`, as `start_broker`.
    """
    _make(directory)
    try:
        text = configuration.read_text(encoding="utf-8")
        text, n_listeners = re.subn(rf"(?m)^listener {port}$", rf"\g<0> {LOOPBACK}", text)
        if n_listeners != 1:
            raise BrokerError(f"{configuration} has {n_listeners} lines `listener {port}`; expected one")
        configuration.write_text(_as_this_user(text), encoding="utf-8")
    except OSError as exc:
        raise BrokerError(f"{configuration} cannot be changed: {exc.strerror or exc}") from exc
    broker = RunningBroker(
        "mosquitto", directory=directory.resolve(), host=LOOPBACK, port=port, configuration=configuration
    )
    broker.start()
    return broker


def free_port() -> int:
    """A port of the loopback address that nobody listens on now. Raises `BrokerError`."""
    return _listen_once(LOOPBACK, 0)


def _as_this_user(configuration: str) -> str:
    """Mosquitto started by root changes to a user that may not write into our directories."""
    return configuration + ("user root\n" if os.geteuid() == 0 else "")


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise BrokerError(f"cannot keep the broker's state in {directory}: {exc.strerror or exc}") from exc


def _listen_once(host: str, port: int) -> int:
    """The port that listening on `host` and `port` gets (port 0: a free one). Raises `BrokerError`."""
    if not 0 <= port <= 65_535:
        raise BrokerError(f"cannot listen on {host}:{port}: a port is a number from 0 to 65535")
    try:
        with socket.create_server((host, port)) as server:
            return int(server.getsockname()[1])
    except OSError as exc:
        raise BrokerError(f"cannot listen on {host}:{port}: {_why(exc)}; choose another port or address") from exc


def _why(exc: OSError) -> str:
    """The system's words; `socket.create_server` adds to them what the message says anyway."""
    return os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc.strerror or exc)
