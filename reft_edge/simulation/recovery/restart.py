"""A coordinator that is killed, and comes back: when does it say something useful, and when has it the update?

With real agents and the federation of `simulation.faults.site`. A spectator listens at the broker.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import msgspec

import reft_edge
from reft_edge.errors import FederationError
from reft_edge.simulation.brokers import RunningBroker, start_broker
from reft_edge.simulation.children import Child, Children
from reft_edge.simulation.faults import site
from reft_edge.simulation.faults.words import COORDINATOR
from reft_edge.simulation.run_directory import FEDERATION_FILE, log_path
from reft_edge.wire.messages import Done, Progress, decode_report
from reft_edge.wire.mqtt import Event, MqttLink, Received
from reft_edge.wire.signing import unseal
from reft_edge.wire.topics import all_devices_filter, parse_device_topic

PATIENCE_S = 120.0
STAGES = ("python", "imports", "prepare", "store", "connect")
Moment = Literal["training", "uploading"]


class Restart(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, one after the other, from kill -9 (and start) to the first task or request of the new process."""

    moment: Moment
    python_s: float
    imports_s: float
    prepare_s: float
    """Model and data."""
    store_s: float
    """The store, and the learner with its first weights."""
    connect_s: float
    first_message_s: float
    total_s: float


class Absence(msgspec.Struct, frozen=True, kw_only=True):
    """An update that was ready while the coordinator was away."""

    away_s: float
    broker_lost_memory: bool
    connect_s: float
    """From the coordinator's start to its connection."""
    first_update_s: float
    """From its connection until it has the first update."""
    last_update_s: float


class Scene:
    """A federation that trains for a while, its broker, and a spectator. A context manager."""

    def __init__(self, directory: Path, *, seconds_a_training: float) -> None:
        self.directory = directory
        self.options = site.SiteOptions(rounds=2, seconds_a_training=seconds_a_training)
        self._stack = ExitStack()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.broker: RunningBroker = start_broker("mosquitto", directory=directory / "broker")
        self._children = Children()
        self._coordinator: Child | None = None

    def __enter__(self) -> Scene:
        self._stack.enter_context(self.broker)
        settings = self.broker.settings
        brokers = dict.fromkeys((*self.options.devices, COORDINATOR), settings)
        site.prepare(self.directory, self.options, quorum=1.0, brokers=brokers)
        topics = [(all_devices_filter(site.FEDERATION, kind), 0) for kind in ("report", "task", "down")]
        link = MqttLink(settings, client_id="spectator", events=self._events, subscriptions=topics, persistent=False)
        link.start(wait_s=PATIENCE_S)
        self._stack.callback(link.stop)
        self._stack.enter_context(self._children)
        for device in self.options.devices:
            self._start(device, ["-m", "reft_edge", "agent", f"agent-{device}.toml", "--quiet"])
        self.start_coordinator()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def start_coordinator(self) -> float:
        """Returns when."""
        began = time.monotonic()
        module = "reft_edge.simulation.recovery.timed_coordinator"
        self._coordinator = self._start("coordinator", ["-m", module, FEDERATION_FILE], read_output=True)
        return began

    def kill_coordinator(self) -> None:
        if self._coordinator is not None:
            self._coordinator.process.kill()
            self._coordinator.process.wait()

    def stage(self, name: str) -> float:
        """When the coordinator has come to the next stage of this name. Raises `FederationError` if it ends before."""
        child = self._coordinator
        if child is not None and child.output is not None:
            for line in child.output:
                word = json.loads(line)
                if word["stage"] == name:
                    return float(word["at"])
        raise FederationError("no coordinator" if child is None else child.obituary())

    def see(self, wanted: Callable[[Received], bool]) -> float:
        """When the spectator next sees such a message; retained ones, which are older than its look, do not count."""
        end = time.monotonic() + PATIENCE_S
        while (left := end - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(event, Received) and not event.retained and event.payload and wanted(event):
                return time.monotonic()
        raise FederationError(f"the spectator waited {PATIENCE_S:g} s in vain")

    def see_all(self, state: Literal["training", "done"]) -> None:
        """Until every device has said that it trains (and so has all blobs), or that it has done so."""
        silent = set(self.options.devices)

        def heard(message: Received) -> bool:
            device, topic = parse_device_topic(site.FEDERATION, message.topic)
            if topic == "report":
                report = decode_report(unseal(message.topic, message.payload).message)
                trains = isinstance(report, Progress) and report.state == "training"
                if trains if state == "training" else isinstance(report, Done):
                    silent.discard(device)
            return not silent

        self.see(heard)

    def forget_messages(self) -> None:
        """What the spectator has heard until now is of no interest."""
        while not self._events.empty():
            self._events.get()

    def _start(self, name: str, arguments: list[str], *, read_output: bool = False) -> Child:
        packages = str(Path(reft_edge.__file__).resolve().parent.parent)
        return self._children.start(
            name,
            [sys.executable, *arguments],
            log_path=log_path(self.directory, name),
            directory=self.directory,
            environment={
                "PYTHONPATH": os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH", "")])),
                "OMP_NUM_THREADS": "1",
            },
            read_output=read_output,
        )


def measure_restart(directory: Path, moment: Moment) -> Restart:
    """Kill the coordinator while devices train, or when the first of them has an update."""
    with Scene(directory, seconds_a_training=3.0 if moment == "uploading" else 20.0) as scene:
        if moment == "training":
            scene.see_all("training")
        else:
            scene.see(lambda message: message.topic.endswith("/report") and b'"done"' in message.payload)
        scene.kill_coordinator()
        scene.forget_messages()
        began = scene.start_coordinator()
        times = [began, *(scene.stage(name) for name in STAGES)]
        times.append(scene.see(lambda message: message.topic.endswith(("/task", "/down"))))
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return Restart(
        moment=moment,
        python_s=seconds[0],
        imports_s=seconds[1],
        prepare_s=seconds[2],
        store_s=seconds[3],
        connect_s=seconds[4],
        first_message_s=seconds[5],
        total_s=times[-1] - began,
    )


def measure_absence(directory: Path, *, away_s: float, broker_loses_memory: bool) -> Absence:
    """The coordinator is away when all updates get ready, and for `away_s` more."""
    with Scene(directory, seconds_a_training=20.0) as scene:
        scene.see_all("training")
        scene.kill_coordinator()
        scene.see_all("done")
        if broker_loses_memory:
            scene.broker.kill()
            (directory / "broker" / "mosquitto.db").unlink(missing_ok=True)
            scene.broker.start()
        time.sleep(away_s)
        began = scene.start_coordinator()
        connected = scene.stage("connect")
        updates = [scene.stage("update") for _ in scene.options.devices]
    return Absence(
        away_s=away_s,
        broker_lost_memory=broker_loses_memory,
        connect_s=connected - began,
        first_update_s=updates[0] - connected,
        last_update_s=updates[-1] - connected,
    )
