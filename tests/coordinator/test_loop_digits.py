"""The whole loop in one process, with the real parts: prune, compile, train, encode, merge, distil, evaluate.

No broker and no agent: this is the reference for what the numbers of a federation should be.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from reft_edge.agent.pacing import Pacer
from reft_edge.agent.trainer import Trainer
from reft_edge.agent.training import train_round
from reft_edge.bundle.bundle import Bundle
from reft_edge.compile import SGD, compile_bundle
from reft_edge.compile.channels import ChannelMap
from reft_edge.compile.prune import Pruner
from reft_edge.coordinator.aggregation import ClientUpdate, merge
from reft_edge.coordinator.batch_norm import reestimate_batch_norm
from reft_edge.coordinator.distillation import distil
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.ensemble import Teacher, teacher_outputs
from reft_edge.coordinator.evaluation import evaluate
from reft_edge.data.dataset import Dataset
from reft_edge.models.registry import build_model
from reft_edge.simulation.digits import INPUT_SHAPE, load_digits_split
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.codecs import decode_tensors
from reft_edge.wire.compensation.error_feedback import ErrorFeedback
from reft_edge.wire.messages import TrainingPlan

RATIOS = {"zero": 0.5, "three": 0.25, "four": 0.0, "nano": 0.25}
ROUNDS = 3
PLAN = TrainingPlan(local_epochs=3, batch_size=32, learning_rate=0.05, seed=0)


@dataclass
class Device:
    name: str
    bundle: Bundle
    channels: ChannelMap
    module: nn.Module
    """Of the variant; the coordinator measures batch-norm statistics with it."""
    data: Dataset
    feedback: ErrorFeedback = field(default_factory=lambda: ErrorFeedback(Int8()))


def tensors_of(module):
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def load(module, tensors):
    module.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})


def make_devices(model, parts):
    pruner = Pruner(model, input_shape=INPUT_SHAPE)
    made = {}
    for ratio in sorted(set(RATIOS.values())):
        module, channels = (model, ChannelMap.identity(tensors_of(model)))
        if ratio:
            variant = pruner.prune(ratio)
            module, channels = variant.module, variant.channels
        bundle = compile_bundle(module, input_shape=INPUT_SHAPE, optimizer=SGD(momentum=0.9))
        made[ratio] = bundle, channels, copy.deepcopy(module)
    return [Device(name, *made[ratio], data) for (name, ratio), data in zip(RATIOS.items(), parts, strict=True)]


def train_on_device(device, global_tensors, seed):
    """What a device gives back: the encoded update, as bytes."""
    received = device.channels.gather(global_tensors)
    trainer = Trainer(device.bundle.with_weights(received), threads=1)
    trained = train_round(
        trainer,
        training=device.data,
        holdout=device.data.take(np.arange(0)),
        plan=PLAN,
        loss=device.bundle.manifest.loss,
        cost=device.bundle.manifest.cost,
        seed=seed,
        pacer=Pacer(None),
        on_step=lambda *_: None,
    )
    return device.feedback.encode({name: tensor - received[name] for name, tensor in trained.tensors.items()})


def play_round(model, devices, public, number):
    """Merge and distil in place; yields after each."""
    start = tensors_of(model)
    updates, teachers = [], []
    for position, device in enumerate(devices):
        blob = train_on_device(device, start, seed=100 * number + position)
        delta = decode_tensors(blob, Int8(), device.bundle.manifest.tensors)
        samples = float(len(device.data))
        updates.append(ClientUpdate(device=device.name, channels=device.channels, delta=delta, weight=samples))
        received = device.channels.gather(start)
        weights = {name: (received[name] + step).astype(received[name].dtype) for name, step in delta.items()}
        load(device.module, weights)
        reestimate_batch_norm(device.module, public.inputs)
        outputs = teacher_outputs(device.bundle.inference_graph, tensors_of(device.module), public.inputs)
        teachers.append(Teacher(name=device.name, outputs=outputs, samples=samples))
    load(model, merge(start, updates))
    yield "averaged"
    reestimate_batch_norm(model, public.inputs)
    yield "merged"
    distil(model, teachers, public.inputs, settings=DistillationSettings(), seed=number)
    yield "distilled"


def train_centrally(model, data, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=PLAN.learning_rate, momentum=0.9)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(epochs):
        for indices in np.array_split(rng.permutation(len(data)), len(data) // PLAN.batch_size):
            batch, targets = torch.as_tensor(data.inputs[indices]), torch.as_tensor(data.targets[indices])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), targets).backward()
            optimizer.step()


@pytest.mark.slow
def test_pruned_devices_with_uneven_data_come_near_central_training_and_distilling_helps():
    digits = load_digits_split(len(RATIOS), alpha=0.5, seed=0)
    torch.manual_seed(0)
    model = build_model("digits_cnn", input_shape=INPUT_SHAPE, n_outputs=10)
    central = build_model("digits_cnn", input_shape=INPUT_SHAPE, n_outputs=10)
    central.load_state_dict(model.state_dict())
    devices = make_devices(model, digits.devices)
    accuracy = [
        {stage: evaluate(model, digits.test).accuracy for stage in play_round(model, devices, digits.public, number)}
        for number in range(1, ROUNDS + 1)
    ]
    train_centrally(central, digits.private, ROUNDS * PLAN.local_epochs)
    assert accuracy[-1]["distilled"] > evaluate(central, digits.test).accuracy - 0.03
    assert all(one["distilled"] > one["averaged"] for one in accuracy)
    assert sum(one["merged"] - one["averaged"] for one in accuracy) > 0
