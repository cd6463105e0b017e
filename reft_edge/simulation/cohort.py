"""A cohort of emulated devices in one process, without a network.

Everything that an update passes through is the product's: compiled steps in onnxruntime, weights blobs and deltas,
codecs with their compensation, and the checks of `contributions` and `screening`. What is missing is what does not
change the numbers: agents, messages, deadlines. Merging, teaching and evaluating are the `Learner`'s business.

Devices of a round may train in several threads at once, each with one onnxruntime thread, which is far more efficient
than one device on several cores: onnxruntime gives the interpreter free while it computes. The result is the same.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.agent.pacing import Pacer
from reft_edge.agent.trainer import Trainer
from reft_edge.agent.training import derive_seed, train_round
from reft_edge.bundle.container import pack_tensors
from reft_edge.coordinator.catalogue import CompiledVariant, Workshop, variant_name
from reft_edge.coordinator.contributions import (
    Contribution,
    check_update,
    decode_contribution,
    received_weights,
    update_length,
)
from reft_edge.coordinator.holdings import graph_blobs
from reft_edge.coordinator.publishing import Chain, encode_weights
from reft_edge.coordinator.screening import outliers
from reft_edge.data.dataset import Dataset, n_batches
from reft_edge.errors import BundleError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codecs import weight_norms
from reft_edge.wire.compensation.methods import UpdateEncoder, codec_in_round, update_encoder
from reft_edge.wire.compensation_names import Uncompensated, keeps_memory
from reft_edge.wire.messages import TrainingPlan, UpdateManifest, WeightsDelta, WeightsRef

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.bundle.bundle import Bundle
    from reft_edge.bundle.manifest import BlobRef
    from reft_edge.coordinator.settings import ModelSettings, TrainingSettings
    from reft_edge.types import Array, Tensors
    from reft_edge.wire.codec_names import Codec


class Kit:
    """What all federations of one initial model have in common: its variants, compiled, and sessions to train them.

    Made once, because compiling takes longer than a short run. `directory` holds its blobs; `model` is only read.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: ModelSettings,
        ratios: Sequence[float],
        *,
        seed: int,
        directory: Path,
        importance: str = "magnitude",
    ) -> None:
        self.blobs = BlobStore(directory)
        self.workshop = Workshop(model, architecture, importance=importance, seed=seed)
        self.parameters = frozenset(name for name, _ in model.named_parameters())
        """Names of the trainable tensors."""
        self.variants: dict[float, CompiledVariant] = {}
        self._model = model
        self._bundles: dict[float, Bundle] = {}
        self._idle: dict[float, list[Trainer]] = {}
        self._lock = threading.Lock()
        for ratio in sorted(set(ratios)):
            self._make(ratio)

    def fresh_model(self) -> nn.Module:
        """The initial model, for somebody who will change it."""
        return copy.deepcopy(self._model)

    @contextmanager
    def trainer(self, ratio: float) -> Iterator[Trainer]:
        """A session of the variant with one thread, for one device at a time."""
        with self._lock:
            idle = self._idle[ratio]
            trainer = idle.pop() if idle else None
        trainer = trainer or Trainer(self._bundles[ratio], threads=1)
        yield trainer
        with self._lock:
            idle.append(trainer)

    def _make(self, ratio: float) -> None:
        bundle, channels = self.workshop.make(ratio)
        for graph in (bundle.training_graph, bundle.inference_graph):
            self.blobs.put(graph)
        self.variants[ratio] = CompiledVariant(
            name=variant_name(ratio),
            ratio=ratio,
            manifest=bundle.manifest,
            manifest_blob=self.blobs.put(bundle.manifest.to_json()),
            channels=channels,
        )
        self._bundles[ratio] = bundle
        self._idle[ratio] = []


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the blobs that one device has fetched and sent. Graphs count once, when they are first needed."""

    down_bytes: int = 0
    up_bytes: int = 0

    def plus(self, *, down_bytes: int = 0, up_bytes: int = 0) -> Traffic:
        return Traffic(down_bytes=self.down_bytes + down_bytes, up_bytes=self.up_bytes + up_bytes)


@dataclass
class EmulatedDevice:
    """One device: what it has, and what it remembers from round to round."""

    name: str
    ratio: float
    data: Dataset
    state: dict[str, Array] = field(default_factory=dict)
    """What its compensation keeps (`wire.compensation`)."""
    memory: BlobRef | None = None
    """What the coordinator remembers of it, where the compensation has a memory on both sides."""
    held: str | None = None
    """SHA-256 of the whole blob of the weights that it trained from last."""
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What one device learned in a round, before it is encoded."""

    device: EmulatedDevice
    weights: WeightsRef
    """What it trained from."""
    delta: dict[str, Array]
    """Trained minus received."""
    loss_first: float
    loss_last: float
    """Mean over the first and over the last local epoch."""


class Cohort:
    """Devices that train the variants of `kit`, as `training` says, in `n_parallel` threads.

    The same arguments and global tensors give the same blobs on one platform, whatever `n_parallel` is.
    """

    def __init__(
        self, kit: Kit, devices: Sequence[EmulatedDevice], training: TrainingSettings, *, n_parallel: int = 1
    ) -> None:
        self.devices = tuple(devices)
        self._kit = kit
        self._training = training
        self._n_parallel = n_parallel
        self._bases: dict[str, WeightsRef] = {}

    def publish(self, global_tensors: Tensors) -> dict[float, WeightsRef]:
        """This round's weights by ratio; every device fetches what it lacks."""
        delta_codec = self._training.delta_encoding
        chain = None if delta_codec is None else Chain(codec=delta_codec, bases=self._bases, held={})
        sent: dict[float, WeightsRef] = {}
        for ratio in sorted({device.ratio for device in self.devices}):
            variant = self._kit.variants[ratio]
            weights, delta = encode_weights(
                variant.name,
                variant,
                variant.channels.gather(global_tensors),
                codec=self._training.weights_encoding,
                blobs=self._kit.blobs,
                chain=chain,
            )
            for device in self.devices:
                if device.ratio == ratio:
                    _fetch(device, variant, weights, delta)
            sent[ratio] = weights
        self._bases = {self._kit.variants[ratio].name: weights for ratio, weights in sent.items()}
        return sent

    def train(self, sent: Mapping[float, WeightsRef], number: int) -> list[Learned]:
        """What every device learns in round `number`, in order of the devices."""
        with ThreadPoolExecutor(self._n_parallel) as pool:
            places = range(len(self.devices))
            return list(pool.map(lambda place: self._learn(place, sent[self.devices[place].ratio], number), places))

    def send(self, learned: Learned, *, number: int) -> Contribution:
        """The device's encoded update, with what its compensation adds of earlier ones."""
        device = learned.device
        encoder = update_encoder(self._training.compensation_method, self._codec(number), device.state)
        contribution = self._send(learned, learned.delta, encoder, number)
        device.state = encoder.state
        return replace(contribution, compensation=self._training.compensation_method, memory=device.memory)

    def send_as(self, learned: Learned, delta: Tensors, *, number: int) -> Contribution:
        """An update of the caller's in place of what the device has learned, which compensates for nothing."""
        return self._send(learned, delta, update_encoder(Uncompensated(), self._codec(number)), number)

    def screen(
        self, contributions: Sequence[Contribution], *, by_length: bool = True
    ) -> tuple[list[Contribution], tuple[str, ...]]:
        """Those that may be merged, and the names of the other devices.

        `by_length`: also reject updates far longer than the cohort's, as the product does.
        """
        good = [one for one in contributions if self._passes(one)]
        if by_length:
            odd = outliers({one.device: update_length(one, self._kit.blobs) for one in good})
            good = [one for one in good if one.device not in odd]
        kept = {one.device for one in good}
        if keeps_memory(self._training.compensation_method):
            self._remember(contributions, kept)
        return good, tuple(one.device for one in contributions if one.device not in kept)

    def _remember(self, contributions: Sequence[Contribution], kept: Collection[str]) -> None:
        """The memory follows an update that is merged; a device whose update is not begins anew."""
        devices = {device.name: device for device in self.devices}
        for one in contributions:
            device = devices[one.device]
            if one.device in kept:
                device.memory = self._kit.blobs.put(pack_tensors(decode_contribution(one, self._kit.blobs)[1]))
            else:
                device.state, device.memory = {}, None

    def _send(self, learned: Learned, delta: Tensors, encoder: UpdateEncoder, number: int) -> Contribution:
        device = learned.device
        unsent = self._unsent(device, learned.weights)
        rng = np.random.default_rng(derive_seed(device.name, str(number), "codec"))
        norms = weight_norms(received_weights(unsent, self._kit.blobs))
        blob = self._kit.blobs.put(encoder.encode(delta, rng=rng, norms=norms))
        device.traffic = device.traffic.plus(up_bytes=blob.size_bytes)
        update = UpdateManifest(
            blob=blob,
            codec=self._codec(number),
            training_samples=len(device.data),
            loss_first=learned.loss_first,
            loss_last=learned.loss_last,
        )
        return replace(unsent, update=update)

    def _learn(self, place: int, weights: WeightsRef, number: int) -> Learned:
        device = self.devices[place]
        variant = self._kit.variants[device.ratio]
        received = received_weights(self._unsent(device, weights), self._kit.blobs)
        seed = 1000 * number + place
        with self._kit.trainer(device.ratio) as trainer:
            trainer.restart(received, seed=seed)
            trained = train_round(
                trainer,
                training=device.data,
                holdout=device.data.take(np.arange(0)),
                plan=self._plan(seed, number),
                loss=variant.manifest.loss,
                cost=variant.manifest.cost,
                seed=seed,
                pacer=Pacer(None),
                on_step=lambda *_: None,
            )
        return Learned(
            device=device,
            weights=weights,
            delta={name: after - received[name] for name, after in trained.tensors.items()},
            loss_first=trained.loss_first,
            loss_last=trained.loss_last,
        )

    def _passes(self, contribution: Contribution) -> bool:
        device = next(one for one in self.devices if one.name == contribution.device)
        steps = self._training.local_epochs * n_batches(len(device.data), self._training.batch_size)
        try:
            check_update(contribution, self._kit.blobs, max_steps=steps)
        except BundleError:
            return False
        return True

    def _plan(self, seed: int, number: int) -> TrainingPlan:
        training = self._training
        return TrainingPlan(
            local_epochs=training.local_epochs,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            learning_rate_schedule=training.schedule,
            seed=seed,
            update_codec=self._codec(number),
            compensation=training.compensation_method,
        )

    def _codec(self, number: int) -> Codec:
        """Of updates in round `number`."""
        return codec_in_round(self._training.update_encoding, self._training.compensation_method, number)

    def _unsent(self, device: EmulatedDevice, weights: WeightsRef) -> Contribution:
        """The device's part before it has sent anything: `received_weights` asks only for variant and weights."""
        nothing = UpdateManifest(
            blob=weights.blob, codec=self._training.update_encoding, training_samples=len(device.data)
        )
        return Contribution(
            device=device.name, variant=self._kit.variants[device.ratio], weights=weights, update=nothing
        )


def _fetch(device: EmulatedDevice, variant: CompiledVariant, weights: WeightsRef, delta: WeightsDelta | None) -> None:
    """Note what a device has to fetch (`coordinator.holdings.download`), and that it holds it now."""
    refs = graph_blobs(variant) if device.held is None else []
    if device.held != weights.blob.sha256:
        refs.append(delta.blob if delta is not None and device.held == delta.base else weights.blob)
    device.traffic = device.traffic.plus(down_bytes=sum(ref.size_bytes for ref in refs))
    device.held = weights.blob.sha256
