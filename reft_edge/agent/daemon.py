"""The agent: a light process that keeps the device in its federation.

    start up      lock the spool, read the state, connect
    know thyself  profile and data, from the spool or measured by the worker; announce them
    main loop     one queue of events: broker, worker, signals, timers -> whom they are for
    stop          say offline, let the worker go

Everything that needs numpy or onnxruntime is done by the worker; blobs go through the disk. So the resident memory of
this process does not depend on any model, and a model that does not fit costs the task, never the agent.

Training (`tasks`) and what the device serves (`serving.deployments`) are two machines side by side. They share the
courier, the spool and the worker's line of jobs: a check waits for the training before it, a roll-back for nothing.
"""

from __future__ import annotations

import logging
import queue
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from reft_edge import logs
from reft_edge.agent.certificate_care import CertificateCare, CertificateRenewed
from reft_edge.agent.credentials import Credentials
from reft_edge.agent.jobs import MAX_REASON_CHARACTERS, JobEnded, Jobs, check_event, training_event
from reft_edge.agent.knowledge import Knowledge
from reft_edge.agent.metrics import AgentMetrics
from reft_edge.agent.protocol import Configure
from reft_edge.agent.serving.deployments import Deployments
from reft_edge.agent.session_words import BlobDelivered, BlobFetched, BlobLost, Fetch, TrainingProgressed
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import Spool
from reft_edge.agent.supervisor import Supervisor, WorkerEnded, WorkerSaid
from reft_edge.agent.tasks import Tasks
from reft_edge.agent.trust import open_deployment, open_task, read_identity
from reft_edge.agent.voice import OFFLINE, Voice
from reft_edge.errors import BrokerError, BundleError, RemoteProtocolError, ResourceError, one_line
from reft_edge.wire.messages import Report
from reft_edge.wire.mqtt import Connected, Disconnected, MqttLink, Received, Rejected, TurnedAway
from reft_edge.wire.patience import for_complaints
from reft_edge.wire.signing import VerifyKey
from reft_edge.wire.topics import DeviceTopic, blob_topic, device_topic
from reft_edge.wire.transfer import Courier, Delivered, Fetched, Lost, TransferEvent

logger = logging.getLogger(__name__)


class StopRequested:
    """Put into the queue by a signal."""


class Daemon:
    """One agent. `base_dir` is the folder that relative paths of the settings start from."""

    def __init__(self, settings: AgentSettings, *, base_dir: Path) -> None:
        self._settings = settings
        self._base_dir = base_dir
        self._identity = read_identity(settings)
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._spool = Spool(base_dir / settings.spool, max_blob_bytes=settings.limits.max_model_bytes)
        self._knowledge = Knowledge(settings, base_dir=base_dir, spool=self._spool)
        self._supervisor = Supervisor(self._worker_configuration(), self._events)
        self._jobs = Jobs(self._supervisor, starting=lambda job: self._deployments.job_begins(job))
        self._link = MqttLink(
            settings.broker,
            client_id=settings.device,
            events=self._events,
            will=(self._topic("status"), OFFLINE),
            subscriptions=[(self._topic("task"), 1), (self._topic("deployment"), 1), (self._topic("down"), 0)],
        )
        self._voice = Voice(self._link, settings, self._identity, base_dir=base_dir)
        self._credentials = Credentials(settings)
        self._care = CertificateCare(self._credentials, self._events, now=time.monotonic())
        self._blob_topics = blob_topic(settings.federation, "", "").rstrip("/") + "/"
        self._complaints = for_complaints()
        self._courier = Courier(
            self._spool.blobs,
            self._voice.transfer,
            may_serve=lambda sha256: self._tasks.may_have(sha256),
            subscribe_block=lambda transfer, name: self._link.subscribe(self._block_topic(transfer, name), 0),
            unsubscribe_block=lambda transfer, name: self._link.unsubscribe(self._block_topic(transfer, name)),
        )
        self._tasks = Tasks(
            settings,
            self._spool,
            self._jobs,
            self._knowledge,
            fetch=self._fetch,
            sweep=self._sweep,
            say=self._say,
            show=self._voice.status,
        )
        self._deployments = Deployments(
            settings,
            self._spool,
            self._jobs,
            fetch=self._fetch,
            sweep=self._sweep,
            say=self._voice.condition,
        )
        self._metrics = AgentMetrics(
            settings,
            spool=self._spool.root,
            link=self._link,
            supervisor=self._supervisor,
            state=lambda: self._tasks.state,
        )

    def run(self) -> None:
        """Serve until a signal asks to stop.

        Raises `BrokerError` when the broker was never reached, `DataError` when the data cannot be used, `ConfigError`
        or `ResourceError` when the spool or the device does not allow to begin.
        """
        self._spool.lock()
        previous = [(number, signal.signal(number, self._on_signal)) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            self._start()
            while not isinstance(event := self._next_event(), StopRequested):
                self._handle(event)
                self._do_what_is_due()
        finally:
            for number, handler in previous:
                signal.signal(number, handler)
            self._stop()

    # Starting and stopping.

    def _start(self) -> None:
        signer = None if self._identity is None else self._identity.coordinator.fingerprint
        self._tasks.start(signer=signer)
        self._deployments.start(signer=signer)
        self._check_trust()
        self._metrics.start()
        for job in self._knowledge.recall():
            self._jobs.add(job)
        # Where no broker was ever reached, a typo is likely; an agent that has worked before waits for ever.
        self._connect(wait_s=None if self._spool.was_used else self._settings.broker.connect_timeout_s)
        self._tasks.resume()
        self._deployments.resume()
        self._jobs_proceed()

    def _check_trust(self) -> None:
        """Say that nobody is checked, or take certificates of the federation that this device is enrolled in."""
        if self._identity is not None:
            self._link.subscribe(self._topic("certificate"), 1)
        elif not self._settings.broker.is_on_this_machine:
            logger.warning(
                "no [trust] in the settings: whoever reaches broker %s decides what is trained here; enrol this device",
                self._settings.broker.address,
            )

    def _connect(self, *, wait_s: float | None) -> None:
        """Raises `BrokerError`, with what is wrong with our own certificate: the broker does not tell."""
        try:
            self._link.start(wait_s=wait_s)
        except BrokerError as exc:
            explanation = self._credentials.explain_refusal() if self._link.turned_away else ""
            raise BrokerError("; ".join(filter(None, (str(exc), explanation)))) from exc

    def _stop(self) -> None:
        logger.info("stopping")
        self._deployments.stop()
        self._metrics.stop()
        self._supervisor.stop()
        self._courier.close()
        self._tasks.stop()
        self._care.stop()
        self._voice.goodbye()
        self._link.stop()
        self._spool.unlock()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._events.put(StopRequested())

    def _worker_configuration(self) -> Configure:
        return Configure(
            device=self._settings.device,
            data=self._settings.data,
            base_dir=str(self._base_dir),
            spool=str(self._spool.root),
            limits=self._settings.limits,
            log_level=logger.getEffectiveLevel(),
            log_format=logs.chosen_format(),
        )

    def _announce(self) -> None:
        """Say what this device is, once that is known and there is somebody to hear it."""
        announcement = self._knowledge.announcement()
        if announcement is not None and self._link.connected:
            self._voice.profile(announcement)

    # The main loop.

    def _next_event(self) -> Any:
        """The next event; None when something is due first."""
        now = time.monotonic()
        timers = [self._courier.next_wakeup(now), self._tasks.remind_at, self._worker_idle_at(), self._jobs.insist_at]
        timers += [self._care.look_at, self._deployments.report.look_at]
        due = min((at for at in timers if at is not None), default=None)
        try:
            return self._events.get(timeout=None if due is None else max(0.0, due - now))
        except queue.Empty:
            return None

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        self._transferred(self._courier.tick(now))
        self._care.tick(now)
        self._deployments.tick(now)
        self._tasks.tick(now)
        if self._jobs.insist_at is not None and now >= self._jobs.insist_at:
            ended = self._jobs.insist(now)
            if ended is not None:
                self._job_ended(ended)
        self._jobs_proceed()
        idle_at = self._worker_idle_at()
        if idle_at is not None and now >= idle_at:
            logger.info("the worker is idle; letting it go")
            self._jobs.release()

    def _worker_idle_at(self) -> float | None:
        return self._jobs.idle_at(self._settings.limits.idle_worker_s)

    def _handle(self, event: Any) -> None:
        match event:
            case Connected():
                self._connected()
            case Disconnected(reason=reason):
                logger.warning("offline: %s", reason)
                self._deployments.report.disconnected()
                self._transferred(self._courier.set_connected(False, time.monotonic()))
            case TurnedAway(reason=reason):
                self._care.explain(reason, time.monotonic())
            case Rejected(reason=reason):
                logger.warning("%s", reason)
            case CertificateRenewed():
                self._announce()
            case Received():
                self._received(event)
            case WorkerSaid() | WorkerEnded():
                self._worker_event(event)

    def _connected(self) -> None:
        self._care.connected()
        self._voice.status(self._tasks.state, again=True)
        self._announce()
        self._tasks.save()  # marks the spool as used: from now on the broker is only away
        self._transferred(self._courier.set_connected(True, time.monotonic()))
        self._deployments.connected(time.monotonic())
        self._tasks.connected()

    def _received(self, message: Received) -> None:
        """A message from the broker; garbage is logged and dropped."""
        try:
            if message.topic == self._topic("task"):
                if message.payload:  # an empty one clears the topic and says nothing to us
                    self._obey(message)
            elif message.topic == self._topic("deployment"):
                if message.payload:
                    self._obey_deployment(message)
            elif message.topic == self._topic("certificate"):
                # It is retained, so the one that we have already comes with every connection.
                if message.payload not in (b"", self._voice.certificate.encode()):
                    self._care.renew(message.payload)
            elif message.topic == self._topic("down") or message.topic.startswith(self._blob_topics):
                self._transferred(self._courier.handle(message.payload, time.monotonic()))
        except (RemoteProtocolError, BundleError) as exc:
            if self._complaints.takes(message.topic, time.monotonic()):
                logger.warning("%s: dropped: %s", one_line(message.topic), exc)

    def _obey(self, message: Received) -> None:
        """Raises `RemoteProtocolError` for what the coordinator did not say, or said long ago."""
        mark = self._tasks.state.mark
        said, mark = open_task(message.topic, message.payload, coordinator=self._coordinator, mark=mark)
        self._tasks.obey(said, mark)

    def _obey_deployment(self, message: Received) -> None:
        """As `_obey`."""
        mark = self._deployments.mark
        said, mark = open_deployment(message.topic, message.payload, coordinator=self._coordinator, mark=mark)
        self._deployments.obey(said, mark)

    @property
    def _coordinator(self) -> VerifyKey | None:
        return None if self._identity is None else self._identity.coordinator

    def _transferred(self, events: Sequence[TransferEvent], *, was_here: bool = False) -> None:
        """`was_here`: what these events say is fetched, lay in the spool before. A blob may be for both sessions."""
        for event in events:
            match event:
                case Fetched(sha256=sha256):
                    fetched = BlobFetched(sha256=sha256, was_here=was_here)
                    self._tasks.feed(fetched)
                    self._deployments.feed(fetched)
                case Lost(sha256=sha256, reason=reason, no_room=no_room):
                    lost = BlobLost(sha256=sha256, reason=reason[:MAX_REASON_CHARACTERS], no_room=no_room)
                    self._tasks.feed(lost)
                    self._deployments.feed(lost)
                case Delivered(sha256=sha256):
                    logger.debug("delivered: %s", sha256)
                    self._tasks.feed(BlobDelivered(sha256=sha256))

    # The worker.

    def _worker_event(self, event: WorkerSaid | WorkerEnded) -> None:
        news = self._jobs.handle(event, time.monotonic())
        if isinstance(news, TrainingProgressed):
            self._tasks.feed(news)
        elif news is not None:
            self._job_ended(news)
            self._jobs_proceed()

    def _jobs_proceed(self) -> None:
        while (failed := self._jobs.proceed(time.monotonic())) is not None:
            self._job_ended(failed)

    def _job_ended(self, ended: JobEnded) -> None:
        """What the worker found out, or how it ended. Raises `DataError` or `ResourceError` when we cannot go on."""
        if self._knowledge.learn(ended):
            self._announce()
            return
        event, checked = training_event(ended), check_event(ended)
        if event is not None:
            self._tasks.feed(event)
        elif checked is not None:
            self._deployments.feed(checked)
        else:
            self._sweep()  # what a training that was cancelled has left

    # What the two machines borrow.

    def _fetch(self, action: Fetch) -> None:
        was_here = self._spool.blobs.has(action.ref.sha256)
        news = self._courier.fetch(action.ref, time.monotonic(), broadcast=action.broadcast)
        self._transferred(news, was_here=was_here)

    def _sweep(self) -> None:
        needed = self._tasks.needed_blobs() | self._deployments.needed_blobs()
        for sha256 in self._courier.fetching - needed:
            self._courier.cancel(sha256)
        try:
            self._spool.sweep(keep_blobs=needed, keep_residuals=self._tasks.needed_residuals())
        except ResourceError as exc:
            logger.error("%s", exc)

    def _say(self, report: Report) -> None:
        self._metrics.said(report)
        self._voice.report(report)

    def _topic(self, topic: DeviceTopic) -> str:
        return device_topic(self._settings.federation, self._settings.device, topic)

    def _block_topic(self, transfer: str, name: str) -> str:
        return blob_topic(self._settings.federation, transfer, name)
