"""A device that speaks the protocol, in one thread: what the coordinator is tested against without the agent.

It trains for real, with the agent's `Trainer`. `behaviour` makes it misbehave in one way.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from reft_edge.agent.admission import task_parts
from reft_edge.agent.received_weights import read_weights
from reft_edge.agent.trainer import Trainer
from reft_edge.bundle.container import pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import BlobRef, Manifest
from reft_edge.coordinator.records import RoundKey
from reft_edge.data.dataset import Dataset, batches
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire import messages, mqtt, topics
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import codec_text
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.compensation.methods import update_encoder
from reft_edge.wire.compensation_names import keeps_memory
from reft_edge.wire.endpoint import BrokerSettings
from reft_edge.wire.signing import SigningKey, seal, unseal
from reft_edge.wire.transfer import Courier, Delivered, Fetched
from tests.certificates import Issued

if TYPE_CHECKING:
    from reft_edge.types import Array

Behaviour = Literal[
    "good",
    "refuses",
    "hesitates",
    "out_of_memory",
    "late",
    "garbage",
    "diverges",
    "again",
    "huge",
    "nan",
    "shapes",
    "lazy",
    "loud",
    "thief",
    "flood",
]
"""`hesitates`: refuses the first task of each round. `late`: reports when its round is over. `again`: announces a
second, different update for each task after the first. `out_of_memory`: fails unless pruned. `huge`: announces an
update of a gigabyte. `nan`: writes values that are not finite. `shapes`: sends tensors of other shapes. `lazy`: sends
zeros and says that its training took years. `loud`: its parameters change 40 times as much, and it claims a million
times as many samples. `thief`: announces its update for another device's task too. `flood`: announces `N_FLOODS`
different useless updates for each task."""

N_FLOODS = 20

LOUD = 40.0
"""Times an honest change: within what the weights allow, and far beyond what the others send."""


def profile(name: str, flops_per_s: float = 1e13, memory_bytes: float = 2**30) -> DeviceProfile:
    def quantity(value: float) -> Quantity:
        return Quantity(value=value, basis="specified")

    return DeviceProfile(
        name=name,
        cores=quantity(1),
        clock_hz=quantity(1e9),
        flops_per_cycle=quantity(2),
        training_flops_per_s=quantity(flops_per_s),
        memory_total_bytes=quantity(memory_bytes),
        memory_available_bytes=quantity(memory_bytes),
        link_down_bytes_per_s=quantity(1e7),
        link_up_bytes_per_s=quantity(1e7),
        link_round_trip_s=quantity(0.001),
    )


class Device:
    def __init__(
        self,
        name: str,
        dataset: Dataset,
        *,
        broker: BrokerSettings,
        federation: str,
        directory,
        behaviour: Behaviour = "good",
        announced: DeviceProfile | None = None,
        identity: Issued | None = None,
        victim: str = "",
    ) -> None:
        """`victim`: whose task a `thief` answers."""
        self.name = name
        self.tasks: list[messages.Task] = []
        self.closed = threading.Event()
        self.states: dict[str, dict[str, Array]] = {}
        """By update (SHA-256): what the next one may go on from."""
        self._dataset = dataset
        self._federation = federation
        self._behaviour = behaviour
        self._certificate = "" if identity is None else identity.certificate_pem.decode()
        self._key = None if identity is None else SigningKey.from_pem(identity.key_pem)
        self._profile = announced or profile(name)
        self._victim = victim
        self._blobs = BlobStore(directory / name)
        self._rebuilt = directory / name / "rebuilt"
        self._rebuilt.mkdir(exist_ok=True)
        self._events: queue.SimpleQueue[mqtt.Event | None] = queue.SimpleQueue()
        offline = messages.encode(messages.Status(online=False))
        self._link = mqtt.MqttLink(
            broker,
            client_id=name,
            events=self._events,
            will=(self._topic("status"), offline),
            subscriptions=[(self._topic("task"), 1), (self._topic("down"), 0)],
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
        self._wanted: set[str] = set()
        self._last_report: messages.Report | None = None
        self._late_report: messages.Report | None = None
        self._said_again = False
        self._n_sent = 0
        self._stopped = False
        self.flooded = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def fetched(self, ref: BlobRef) -> bool:
        """Whether a blob has come to it."""
        return self._blobs.has(ref.sha256)

    def __enter__(self) -> Device:
        self._link.start(wait_s=20)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def has_trained(self) -> bool:
        """Whether a `late` one has something to report."""
        return self._late_report is not None

    def stop(self) -> None:
        """Go offline. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self._events.put(None)
        self._thread.join()
        self._link.publish(self._topic("status"), messages.encode(messages.Status(online=False)), retain=True)
        self._link.stop()

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
        elif isinstance(event, mqtt.Received) and event.topic == self._topic("task"):
            if event.payload:
                self._take(messages.decode_task(unseal(event.topic, event.payload).message))
            elif self._late_report is not None:
                self._report(self._late_report)
        elif isinstance(event, mqtt.Received) and event.payload:
            self._act(self._courier.handle(event.payload, now))

    def _announce(self) -> None:
        status = messages.Status(online=True, state="idle")
        self._link.publish(self._topic("status"), messages.encode(status), retain=True)
        announcement = messages.ProfileAnnouncement(
            profile=self._profile,
            training_samples=len(self._dataset),
            input_shape=self._dataset.sample_shape,
            n_classes=self._dataset.n_classes,
        )
        topic = self._topic("profile")
        sealed = seal(topic, messages.encode(announcement), self._key, certificate=self._certificate)
        self._link.publish(topic, sealed, retain=True)

    def _take(self, task: messages.TaskMessage) -> None:
        if isinstance(task, messages.Close):
            self.closed.set()
            return
        if self.tasks and self.tasks[-1].task == task.task:
            if self._last_report is not None:  # the broker or the coordinator may have lost it
                self._report(self._last_report)
            return
        self.tasks.append(task)
        self._last_report = None
        self._said_again = False
        first = sum(known.round == task.round for known in self.tasks) == 1
        if self._behaviour == "refuses" or (self._behaviour == "hesitates" and first):
            self._report(messages.Refused(task=task.task, reason="on battery"))
        else:
            self._report(messages.Accepted(task=task.task))
            self._want(task.bundle)

    def _want(self, *refs) -> None:
        self._wanted = {ref.sha256 for ref in refs}
        for ref in refs:
            self._act(self._courier.fetch(ref, time.monotonic(), broadcast=self.tasks[-1].broadcast))

    def _act(self, events) -> None:
        for event in events:
            if isinstance(event, Fetched) and event.sha256 in self._wanted:
                self._wanted.discard(event.sha256)
                self._fetched(event.sha256)
            elif isinstance(event, Delivered) and self._behaviour == "again" and not self._said_again:
                self._said_again = True
                self._done(self.tasks[-1], self._update * np.float32(0.5))
            elif isinstance(event, Delivered) and self._behaviour == "flood":
                self._n_sent += 1
                if self._n_sent < N_FLOODS:
                    self._done(self.tasks[-1], self._update * np.float32(1 + self._n_sent))
                else:
                    self.flooded.set()

    def _fetched(self, sha256: str) -> None:
        task = self.tasks[-1]
        if sha256 == task.bundle.sha256:
            self._manifest = Manifest.from_json(self._blobs.read(task.bundle))
            self._want(*task_parts(self._manifest, task, has_weights=self._has_weights))
        elif not self._wanted:
            self._train(task)

    def _has_weights(self, sha256: str) -> bool:
        return self._blobs.has(sha256) or (self._rebuilt / sha256).is_file()

    def _train(self, task: messages.Task) -> None:
        manifest = self._manifest
        if self._behaviour == "out_of_memory" and "x" not in manifest.model:
            self._report(messages.Failed(task=task.task, kind="out_of_memory", reason="killed by the kernel"))
            return
        weights = read_weights(task, manifest, blobs=self._blobs, rebuilt=self._rebuilt)
        graphs = (self._blobs.read(manifest.training_graph), self._blobs.read(manifest.inference_graph))
        trainer = Trainer.from_parts(manifest, *graphs, weights, threads=1, seed=task.plan.seed)
        rng = np.random.default_rng(task.plan.seed)
        self._steps = 0
        self._losses = []
        for _ in range(task.plan.local_epochs):
            for inputs, targets in batches(self._dataset, task.plan.batch_size, rng):
                self._losses.append(trainer.step(inputs, targets, task.plan.learning_rate))
        state = trainer.state()
        self._update = _Tensors({name: state[name] - weights[name] for name in weights})
        if self._behaviour == "loud":
            louder = {spec.name: self._update.values[spec.name] * np.float32(LOUD) for spec in manifest.parameters}
            self._update = _Tensors(self._update.values | louder)
        factors = {"diverges": 1e6, "flood": 1e6, "lazy": 0.0}
        self._update = self._update * np.float32(factors.get(self._behaviour, 1.0))
        if self._behaviour == "shapes":
            self._update = _Tensors({name: np.pad(values, 1) for name, values in weights.items()})
        self._done(task, self._update)

    def _done(self, task: messages.Task, update: _Tensors) -> None:
        data = self._encode(task, update)
        if self._behaviour == "garbage":
            data = data[:-7] + b"garbage"
        blob = self._blobs.put(data)
        if self._behaviour == "huge":
            blob = BlobRef(sha256=blob.sha256, size_bytes=10**9)
        samples = len(self._dataset) * (10**6 if self._behaviour == "loud" else 1)
        done = messages.Done(
            task=task.task,
            round=task.round,
            update=messages.UpdateManifest(
                blob=blob,
                codec=task.plan.update_codec,
                memory=task.memory if task.memory in self.states else None,
                training_samples=samples,
                loss_first=self._losses[0],
                loss_last=self._losses[-1],
            ),
            measured=messages.Measured(
                download_s=0.1,
                start_s=0.1,
                training_s=1e9 if self._behaviour == "lazy" else 0.1,
                steps=len(self._losses),
                peak_memory_bytes=10**8,
            ),
        )
        if self._behaviour == "thief":
            stolen = RoundKey(run=task.run, number=task.round).task(self._victim)
            self._report(msgspec.structs.replace(done, task=stolen))
        if self._behaviour == "late":
            self._late_report = done
        else:
            self._report(done)

    def _encode(self, task: messages.Task, update: _Tensors) -> bytes:
        if keeps_memory(task.plan.compensation):
            return self._encode_from(task, update)
        if self._behaviour != "nan":
            return encode_tensors(update.values, task.plan.update_codec)
        tensors = encoded_tensors(update.values, task.plan.update_codec)
        name = next(name for name, values in tensors.items() if values.dtype == np.float32)
        tensors[name] = np.full_like(tensors[name], np.nan)
        return pack_tensors(tensors, {"codec": codec_text(task.plan.update_codec)})

    def _encode_from(self, task: messages.Task, update: _Tensors) -> bytes:
        """Go on from what the coordinator names, and remember what comes after it."""
        encoder = update_encoder(task.plan.compensation, task.plan.update_codec, self.states.get(task.memory or ""))
        data = encoder.encode(update.values)
        self.states[hashlib.sha256(data).hexdigest()] = encoder.state
        return data

    def _report(self, report: messages.Report) -> None:
        self._last_report = report
        topic = self._topic("report")
        self._link.publish(topic, seal(topic, messages.encode(report), self._key))

    def _topic(self, kind: topics.DeviceTopic) -> str:
        return topics.device_topic(self._federation, self.name, kind)


def encoded_tensors(values, codec):
    """What a container holds of an update, to be broken."""
    data = encode_tensors(values, codec)
    return unpack_tensors(data, max_bytes=2**30)[0]


class _Tensors:
    """Tensors that can be scaled."""

    def __init__(self, values) -> None:
        self.values = values

    def __mul__(self, factor) -> _Tensors:
        return _Tensors({name: (value * factor).astype(value.dtype) for name, value in self.values.items()})
