"""A device that serves models, in one thread: what deployments are tested against without the agent.

It fetches for real and runs nothing. `behaviour` says what its check finds.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from typing import Literal

from reft_edge.bundle.container import decompress
from reft_edge.wire import deployment, messages, mqtt, topics
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.signing import SigningKey, seal, unseal
from reft_edge.wire.transfer import Courier, Fetched
from tests.coordinator.device import profile

Behaviour = Literal["good", "refuses", "fails", "silent", "dies", "too_slow"]
"""`silent`: never says a word about a deployment. `dies`: is offline as soon as it is asked. `too_slow`: refuses all
models but `small`."""

HEALTH = {"latency_p50_s": 0.001, "latency_p95_s": 0.002, "latency_p99_s": 0.003, "peak_memory_bytes": 10**7}


class ServingDevice:
    def __init__(self, name, *, broker, federation, directory, behaviour: Behaviour = "good", identity=None) -> None:
        self.name = name
        self.heard: list[deployment.DeploymentMessage] = []
        self.serving: deployment.Served | None = None
        self.previous: deployment.Served | None = None
        self.said: queue.SimpleQueue[deployment.DeploymentMessage] = queue.SimpleQueue()
        self.serves = threading.Event()
        self._behaviour = behaviour
        self._federation = federation
        self._certificate = "" if identity is None else identity.certificate_pem.decode()
        self._key = None if identity is None else SigningKey.from_pem(identity.key_pem)
        self._attempt: deployment.Attempt | None = None
        self._deploy: deployment.Deploy | None = None
        self._errors = 0
        self._blobs = BlobStore(directory / name)
        self._wanted: set[str] = set()
        self._events: queue.SimpleQueue[mqtt.Event | None] = queue.SimpleQueue()
        self._link = mqtt.MqttLink(
            broker,
            client_id=name,
            events=self._events,
            will=(self._topic("status"), messages.encode(messages.Status(online=False))),
            subscriptions=[(self._topic("deployment"), 1), (self._topic("down"), 0)],
        )
        self._courier = Courier(
            self._blobs,
            lambda payload: self._link.publish(self._topic("up"), payload, qos=0),
            subscribe_block=lambda transfer, index: self._link.subscribe(
                topics.blob_topic(federation, transfer, index), 1
            ),
            unsubscribe_block=lambda transfer, index: self._link.unsubscribe(
                topics.blob_topic(federation, transfer, index)
            ),
        )
        self._thread = threading.Thread(target=self._run, name=name)

    def __enter__(self) -> ServingDevice:
        self._link.start(wait_s=20)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._events.put(None)
        self._thread.join()
        self._say("status", messages.Status(online=False), signed=False)
        self._link.stop()

    def err(self) -> None:
        """Tell of three requests that what it serves could not answer. From any thread."""
        self._errors = 3
        self._tell()

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            due = self._courier.next_wakeup(now)
            try:
                event = self._events.get(timeout=None if due is None else max(0.0, due - now))
            except queue.Empty:
                self._act(self._courier.tick(time.monotonic()))
                continue
            if event is None:
                self._courier.close()
                return
            self._handle(event)

    def _handle(self, event: mqtt.Event) -> None:
        now = time.monotonic()
        if isinstance(event, mqtt.Connected):
            self._announce()
            self._act(self._courier.set_connected(True, now))
        elif isinstance(event, mqtt.Disconnected):
            self._courier.set_connected(False, now)
        elif isinstance(event, mqtt.Received) and event.topic == self._topic("deployment"):
            if event.payload:
                self._take(deployment.decode_deployment(unseal(event.topic, event.payload).message))
        elif isinstance(event, mqtt.Received) and event.payload:
            self._act(self._courier.handle(event.payload, now))

    def _announce(self) -> None:
        self._say("status", messages.Status(online=True, state="idle"), signed=False)
        announcement = messages.ProfileAnnouncement(
            profile=profile(self.name), training_samples=0, holdout_samples=10, input_shape=(6,), n_classes=3
        )
        self._say("profile", announcement, certificate=self._certificate)
        self._tell()

    def _take(self, message: deployment.DeploymentMessage) -> None:
        self.heard.append(message)
        self.said.put(message)
        if self._behaviour == "silent":
            return
        if isinstance(message, deployment.Rollback):
            self._go_back(message.deployment)
        elif self._attempt is None or (self._attempt.deployment, self._attempt.model) != (
            message.deployment,
            message.model,
        ):
            self._fetch(message)

    def _fetch(self, deploy: deployment.Deploy) -> None:
        self._deploy = deploy
        if self._behaviour == "dies":
            self._say("status", messages.Status(online=False), signed=False)
            return
        self._tell("fetching")
        self._wanted = {file.blob.sha256 for file in deploy.files}
        for file in deploy.files:
            self._act(self._courier.fetch(file.blob, time.monotonic(), broadcast=deploy.broadcast))

    def _act(self, events) -> None:
        for event in events:
            if isinstance(event, Fetched) and event.sha256 in self._wanted:
                self._wanted.discard(event.sha256)
                if not self._wanted and self._deploy is not None:
                    self._check(self._deploy)

    def _check(self, deploy: deployment.Deploy) -> None:
        content = {file.precision: decompress(self._blobs.read(file.blob), max_bytes=2**24) for file in deploy.files}
        assert all(len(content[file.precision]) == file.size_bytes for file in deploy.files)
        if self._behaviour == "refuses":
            self._tell("refused", kind="accuracy", reason="accuracy 10.0% on its holdout, 90.0% before")
        elif self._behaviour == "fails":
            self._tell("failed", kind="crashed", reason="the check ran out of memory")
        elif self._behaviour == "too_slow" and deploy.model != "small":
            self._tell("refused", kind="latency", reason="95th percentile 90 ms")
        else:
            self._switch(deploy, content)

    def _switch(self, deploy: deployment.Deploy, content: dict[str, bytes]) -> None:
        precision: deployment.Precision = "int8" if "int8" in content else "float32"
        if self.serving is None or self.serving.deployment != deploy.deployment:
            self.previous = self.serving
        self.serving = deployment.Served(
            deployment=deploy.deployment,
            version=deploy.version,
            model=deploy.model,
            precision=precision,
            sha256=hashlib.sha256(content[precision]).hexdigest(),
        )
        health = tuple(
            deployment.Health(precision=one, metric=0.9, metric_before=0.8, holdout_samples=10, **HEALTH)
            for one in content
        )
        self._tell("serving", health=health)
        self.serves.set()

    def _go_back(self, deployment_id: str) -> None:
        if self.serving is not None and self.serving.deployment == deployment_id:
            self.serving, self.previous = self.previous, None
        self._deploy, self._wanted = None, set()
        self._attempt = deployment.Attempt(deployment=deployment_id, state="rolled_back")
        self._tell()

    def _tell(self, state: deployment.AttemptState | None = None, **details) -> None:
        """Its condition, retained; with a state, what became of the deployment that it works on."""
        if state is not None and self._deploy is not None:
            self._attempt = deployment.Attempt(
                deployment=self._deploy.deployment, model=self._deploy.model, state=state, **details
            )
        counts = None
        if self.serving is not None:
            counts = deployment.PredictionCounts(version=self.serving.version, errors=self._errors)
        condition = deployment.Condition(
            serving=self.serving, previous=self.previous, attempt=self._attempt, counts=counts
        )
        self._say("condition", condition)

    def _say(self, kind: topics.DeviceTopic, message, *, certificate: str = "", signed: bool = True) -> None:
        topic = self._topic(kind)
        payload = seal(topic, messages.encode(message), self._key if signed else None, certificate=certificate)
        self._link.publish(topic, payload, retain=True)

    def _topic(self, kind: topics.DeviceTopic) -> str:
        return topics.device_topic(self._federation, self.name, kind)
