"""One way of encoding, from the first round to the last: the product's parts on digits, in one process.

Updates are merged as they come (no distillation), so that what a codec does is not covered by what a teacher mends. A
method whose coordinator keeps a memory is decoded with it, and what comes out goes the way of every update: checks,
screening, merge.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.agent.training import derive_seed
from reft_edge.bundle.manifest import CrossEntropy, TensorSpec
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.catalogue import initial_model
from reft_edge.coordinator.contributions import Contribution
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.evaluation import evaluate
from reft_edge.coordinator.learning import Learner, LearningOptions
from reft_edge.coordinator.settings import ModelSettings, TrainingSettings
from reft_edge.simulation.codecs.records import CodecRun, CodecSettings, Message, Way
from reft_edge.simulation.cohort import Cohort, EmulatedDevice, Kit, Learned
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, load_digits_split
from reft_edge.wire.codec_names import Float32
from reft_edge.wire.codecs import decode_tensors, encode_tensors, weight_norms
from reft_edge.wire.compensation.methods import codec_in_round, decode_update, update_encoder
from reft_edge.wire.compensation_names import Uncompensated
from reft_edge.wire.messages import UpdateManifest

if TYPE_CHECKING:
    from reft_edge.types import Array, Tensors
    from reft_edge.wire.codec_names import Codec

REFERENCE_ROUND = 3
"""Whose update is the one message: the first are not typical."""

UNCOMPRESSED = Way(update=Float32(), compensation=Uncompensated())

REPEATS = 3
"""Of encoding and decoding; the fastest counts."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one device made of the weights that it got."""

    ratio: float
    specs: Sequence[TensorSpec]
    weights: dict[str, Array]
    delta: dict[str, Array]


class Ground:
    """What all runs of one seed have in common. `directory` holds its blobs."""

    def __init__(self, settings: CodecSettings, *, seed: int, directory: Path) -> None:
        self.settings = settings
        self.seed = seed
        self.digits = load_digits_split(len(settings.ratios), alpha=settings.alpha, seed=seed)
        architecture = ModelSettings(name=settings.model, input_shape=INPUT_SHAPE, n_outputs=N_CLASSES)
        model = initial_model(architecture, base_dir=directory, seed=seed)
        self.kit = Kit(model, architecture, settings.ratios, seed=seed, directory=directory)
        self._round = _reference(self)
        self._one_shot = _one_shot(self)

    def message(self, codec: Codec) -> Message:
        """The reference update under `codec`, and the one-shot updates."""
        one = self._round
        norms = weight_norms(one.weights)
        encode_s, decode_s = [], []
        for _ in range(REPEATS):
            began = time.process_time()
            data = encode_tensors(one.delta, codec, rng=np.random.default_rng(self.seed), norms=norms)
            encoded = time.process_time()
            received = decode_tensors(data, codec, one.specs)
            encode_s.append(encoded - began)
            decode_s.append(time.process_time() - encoded)
        return Message(
            n_bytes=len(data),
            encode_s=min(encode_s),
            decode_s=min(decode_s),
            relative_error=_relative_error(one.delta, received),
            one_shot_accuracy=fmean(self._teacher_accuracy(update, codec) for update in self._one_shot),
        )

    def _teacher_accuracy(self, update: Update, codec: Codec) -> float:
        """On the test data, of the model that the coordinator makes of one device's update."""
        rng = np.random.default_rng(self.seed)
        data = encode_tensors(update.delta, codec, rng=rng, norms=weight_norms(update.weights))
        received = decode_tensors(data, codec, update.specs)
        test = self.digits.test
        with self.kit.trainer(update.ratio) as trainer:
            trainer.restart({name: update.weights[name] + received[name] for name in received}, seed=0)
            outputs = trainer.predict(test.inputs, batch_size=self.settings.batch_size)
        return float((outputs.argmax(axis=1) == test.targets).mean())


def run_way(ground: Ground, way: Way) -> CodecRun:
    """All rounds. The same arguments give the same accuracy and bytes on one platform."""
    federation = _Federation(ground, way)
    for number in range(1, ground.settings.rounds + 1):
        federation.round(number)
    return CodecRun(
        way=way,
        seed=ground.seed,
        message=ground.message(way.update),
        accuracy=tuple(federation.accuracy),
        up_bytes=tuple(federation.up_bytes),
        down_bytes=tuple(federation.down_bytes),
        rejected=federation.rejected,
    )


class _Federation:
    def __init__(self, ground: Ground, way: Way, *, local_epochs: int | None = None) -> None:
        settings, kit = ground.settings, ground.kit
        self._ground = ground
        self._way = way
        self._kit = kit
        training = TrainingSettings(
            local_epochs=local_epochs or settings.local_epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            update_codec=Float32(),  # of what has been decoded; bytes are counted before
            delta_codec="none" if way.delta is None else way.delta,
        )
        devices = [
            EmulatedDevice(name=f"device-{place}", ratio=ratio, data=ground.digits.devices[place])
            for place, ratio in enumerate(settings.ratios)
        ]
        self._cohort = Cohort(kit, devices, training)
        options = LearningOptions(
            loss=CrossEntropy(),
            aggregation=AggregationSettings(),
            distillation=DistillationSettings(epochs=0),
            seed=ground.seed,
        )
        self._learner = Learner(kit.fresh_model(), kit.blobs, options, kit.workshop.module)
        self._weights = self._learner.save()
        self._states: dict[str, dict[str, Array]] = {}
        self._memories: dict[str, dict[str, Array]] = {}
        self.accuracy: list[float] = []
        self.up_bytes: list[int] = []
        self.down_bytes: list[int] = []
        self.rejected = 0

    def learn(self, number: int) -> list[Learned]:
        """What the devices make of this round's weights."""
        before = self._down()
        sent = self._cohort.publish(self._learner.read(self._weights))
        self.down_bytes.append(self._down() - before - (self._graphs() if number == 1 else 0))
        return self._cohort.train(sent, number)

    def round(self, number: int) -> None:
        learned = self.learn(number)
        self.up_bytes.append(0)
        good, bad = self._cohort.screen([self._send(one, number) for one in learned])
        self.rejected += len(bad)
        if good:
            self._weights = self._learner.merge(self._weights, good).weights
        self.accuracy.append(evaluate(self._learner.model, self._ground.digits.test).accuracy or 0.0)

    def _send(self, learned: Learned, number: int) -> Contribution:
        """What the coordinator makes of the device's message."""
        device, way = learned.device, self._way
        variant = self._kit.variants[device.ratio]
        specs = variant.manifest.tensors
        codec = codec_in_round(way.update, way.compensation, number)
        encoder = update_encoder(way.compensation, codec, self._states.get(device.name))
        weights = _received(self._kit, learned)
        rng = np.random.default_rng(derive_seed(device.name, str(self._ground.seed), str(number), "codec"))
        data = encoder.encode(learned.delta, rng=rng, norms=weight_norms(weights))
        self._states[device.name] = encoder.state
        self.up_bytes[-1] += len(data)
        memory = self._memories.get(device.name)
        update, self._memories[device.name] = decode_update(way.compensation, data, codec, specs, memory)
        manifest = UpdateManifest(
            blob=self._kit.blobs.put(encode_tensors(update, Float32())),
            codec=Float32(),
            training_samples=len(device.data),
        )
        return Contribution(device=device.name, variant=variant, weights=learned.weights, update=manifest)

    def _down(self) -> int:
        return sum(device.traffic.down_bytes for device in self._cohort.devices)

    def _graphs(self) -> int:
        """Bytes of graphs and manifests, which every device fetched in the first round."""
        manifests = [self._kit.variants[device.ratio] for device in self._cohort.devices]
        return sum(
            one.manifest_blob.size_bytes
            + one.manifest.training_graph.size_bytes
            + one.manifest.inference_graph.size_bytes
            for one in manifests
        )


def _reference(ground: Ground) -> Update:
    """Of device 0 in the reference round."""
    federation = _Federation(ground, UNCOMPRESSED)
    for number in range(1, REFERENCE_ROUND):
        federation.round(number)
    return _update(ground.kit, federation.learn(REFERENCE_ROUND)[0])


def _one_shot(ground: Ground) -> list[Update]:
    """Of all devices, after as many epochs as a one-shot round has."""
    federation = _Federation(ground, UNCOMPRESSED, local_epochs=ground.settings.one_shot_epochs)
    return [_update(ground.kit, learned) for learned in federation.learn(1)]


def _update(kit: Kit, learned: Learned) -> Update:
    ratio = learned.device.ratio
    specs = kit.variants[ratio].manifest.tensors
    return Update(ratio=ratio, specs=specs, weights=_received(kit, learned), delta=learned.delta)


def _received(kit: Kit, learned: Learned) -> dict[str, Array]:
    """The weights that the device trained from."""
    specs = kit.variants[learned.device.ratio].manifest.tensors
    return decode_tensors(kit.blobs.read(learned.weights.blob), learned.weights.codec, specs)


def _relative_error(sent: Tensors, received: Tensors) -> float:
    names = [name for name, tensor in sent.items() if tensor.ndim > 1 and tensor.dtype.kind == "f"]
    error = sum(float(np.square(sent[name].astype(np.float64) - received[name]).sum()) for name in names)
    return float(np.sqrt(error / sum(float(np.square(sent[name], dtype=np.float64).sum()) for name in names)))
