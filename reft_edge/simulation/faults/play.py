"""One run: set up, start everybody, break what the script says, wait for the end, look at what is left.

Plays in the caller's thread, which must live as long as the run: the kernel ends children with the thread that started
them.
"""

from __future__ import annotations

import logging
import queue
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from reft_edge.errors import BrokerError, ReftError
from reft_edge.simulation.brokers import RunningBroker, start_broker
from reft_edge.simulation.children import Children
from reft_edge.simulation.faults import disk
from reft_edge.simulation.faults.cast import Cast, processes_in
from reft_edge.simulation.faults.injector import Injector
from reft_edge.simulation.faults.inspection import check_spool, inspect, read_ledger
from reft_edge.simulation.faults.progress import Progress
from reft_edge.simulation.faults.site import FEDERATION, SiteOptions, prepare, spool_of
from reft_edge.simulation.faults.ways import Ways
from reft_edge.simulation.faults.words import COORDINATOR, Figures, Outcome, Script
from reft_edge.wire.messages import Close, decode_task
from reft_edge.wire.mqtt import Event, MqttLink, Received
from reft_edge.wire.signing import unseal
from reft_edge.wire.topics import PREFIX

TIMEOUT_S = 140.0
"""A quiet run takes about 15 s; the slowest that is right waits for a few pauses and for reconnect delays of 30 s."""

POOR_LINK_TIMEOUT_S = 300.0
"""With 5% loss and 200 ms, TCP carries some 40 KB/s, and a round has about 600."""

_FAREWELL_S = 45.0
"""For the last agent to hear that the run is over: it may be waiting to connect again."""

_LOOK_S = 0.01
_AGENT_STOP_S = 10.0
_BROKER_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


def play(script: Script, directory: Path, options: SiteOptions, *, keep: bool = False) -> Outcome:
    """Play in `directory`, which is created, and removed again when all is well and `keep` is not wanted."""
    directory = directory.resolve()
    directory.mkdir(parents=True)
    began = time.monotonic()
    play = _Play(script, directory, options)
    try:
        play.run()
    except ReftError as exc:
        play.complaints.append(f"{type(exc).__name__}: {exc}")
    outcome = play.outcome(time.monotonic() - began)
    if outcome.survived and not keep:
        shutil.rmtree(directory)
    return outcome


class _Play:
    """The run in progress."""

    def __init__(self, script: Script, directory: Path, options: SiteOptions) -> None:
        self._script = script
        self._directory = directory
        self._options = options
        self.complaints: list[str] = []
        self._injected: tuple[str, ...] = ()
        self._missed: tuple[str, ...] = ()
        self._figures = Figures()
        self._history: tuple[str, ...] = ()
        self._weights = ""

    def run(self) -> None:
        """Raises `ReftError` for what makes it impossible to go on."""
        directory, devices = self._directory, self._options.devices
        with ExitStack() as stack:
            broker = stack.enter_context(start_broker("mosquitto", directory=directory / "broker"))
            ways = stack.enter_context(Ways(broker.settings, (COORDINATOR, *devices), self._script))
            full = {fault.device for fault in self._script.faults if fault.kind == "disk-full"}
            disks = {device: stack.enter_context(disk.mounted(spool_of(directory, device))) for device in full}
            brokers, quorum = ways.settings, self._script.quorum
            prepare(directory, self._options, quorum=quorum, brokers=brokers)
            children = stack.enter_context(Children())
            cast = Cast(directory, devices=devices, broker=broker, ways=ways, children=children)
            cast.start()
            injector = Injector(self._script, cast=cast, ways=ways, disks=disks, began=time.monotonic())
            try:
                self._until_finished(cast, injector)
            finally:
                injector.end()
                self._injected = tuple(fault.kind for fault in injector.injected)
                self._missed = tuple(fault.kind for fault in injector.missed)
            self._say_farewell(cast)
            self._stop_agents(cast)
            cast.coordinator.kill()  # it has ended, unless something is wrong already
            self.complaints += left_at_broker(broker)
            broker.stop()
            # Here, because `children` ends whatever they have left.
            self.complaints += [f"process left: {process}" for process in processes_in(directory)]
            self._inspect()

    def outcome(self, seconds: float) -> Outcome:
        return Outcome(
            seed=self._script.seed,
            script=self._script,
            seconds=round(seconds, 2),
            injected=self._injected,
            missed=self._missed,
            complaints=tuple(self.complaints),
            figures=self._figures,
            history=self._history,
            weights=self._weights,
            directory=str(self._directory),
        )

    def _until_finished(self, cast: Cast, injector: Injector) -> None:
        """Until the coordinator has ended by itself; complains when it failed or takes too long.

        One that finds no broker when it is started for the first time ends, because a typo is likely; the service
        manager starts it again (`RestartPreventExitStatus` in `broker_config`), and so do we.
        """
        progress = Progress(self._directory, self._options.devices)
        poor = any(fault.kind == "poor-link" for fault in self._script.faults)
        timeout_s = POOR_LINK_TIMEOUT_S if poor else TIMEOUT_S
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            now = time.monotonic()
            for sign in progress.look():
                _log.debug("%s", sign)
                injector.notice(sign, now)
            injector.act(now)
            if not cast.coordinator.killed and cast.coordinator.status is not None:
                if cast.coordinator.status == BrokerError.exit_code:
                    cast.coordinator.start()
                    continue
                if cast.coordinator.status != 0 or not progress.finished:
                    self.complaints.append(cast.coordinator.obituary())
                return
            if died := cast.died():
                self.complaints += died
                return
            time.sleep(_LOOK_S)
        self.complaints.append(f"it has not finished after {timeout_s:g} s: {cast.coordinator.obituary()}")

    def _say_farewell(self, cast: Cast) -> None:
        """Until every agent has heard that the run is over and has forgotten it."""
        end = time.monotonic() + (0.0 if self.complaints else _FAREWELL_S)
        waiting = list(self._options.devices)
        while waiting and time.monotonic() < end:
            waiting = [device for device in waiting if check_spool(spool_of(self._directory, device))]
            time.sleep(_LOOK_S)
        self.complaints += [f"{device} has not heard that the run is over" for device in waiting if not self.complaints]
        workers = [device for device in cast.agents if cast.worker(device) is not None]
        self.complaints += [f"{device} keeps its worker after the run" for device in workers]

    def _stop_agents(self, cast: Cast) -> None:
        for device, agent in cast.agents.items():
            status = agent.stop(_AGENT_STOP_S)
            if status != 0:
                self.complaints.append(f"{device} was told to stop, and ended with {status}")

    def _inspect(self) -> None:
        ledger = read_ledger(self._directory)
        if ledger is None:
            self.complaints.append("no run has begun")
            return
        self._history, self._weights = ledger.history(), ledger.weights
        self._figures, complaints = inspect(
            self._directory,
            ledger,
            devices=self._options.devices,
            rounds=self._options.rounds,
            script=self._script,
        )
        self.complaints += complaints


def left_at_broker(broker: RunningBroker) -> list[str]:
    """Complaints about retained messages: blocks, and tasks that are not the end of the run."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sentinel = f"{PREFIX}/end-of-retained"
    link = MqttLink(
        broker.settings, client_id="inspector", events=events, subscriptions=[(f"{PREFIX}/#", 1)], persistent=False
    )
    link.start(wait_s=_BROKER_TIMEOUT_S)
    complaints: list[str] = []
    try:
        link.publish(sentinel, b".")
        while True:
            event = events.get(timeout=_BROKER_TIMEOUT_S)
            if not isinstance(event, Received):
                continue
            if event.topic == sentinel:
                return complaints
            kind = event.topic.removeprefix(f"{PREFIX}/{FEDERATION}/").split("/")
            if kind[0] == "blob" or (kind[-1] == "task" and not _is_the_end(event)):
                complaints.append(f"the broker still holds {event.topic}")
    except queue.Empty:
        return [*complaints, "the broker does not tell what it holds"]
    finally:
        link.stop()


def _is_the_end(event: Received) -> bool:
    return isinstance(decode_task(unseal(event.topic, event.payload).message), Close)
