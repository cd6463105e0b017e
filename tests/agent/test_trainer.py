from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reft_edge.agent.trainer import Trainer
from reft_edge.bundle.bundle import Bundle
from reft_edge.compile import SGD, Adam, compile_bundle
from reft_edge.errors import BundleError, DataError

RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((12, 6), np.float32)
TARGETS = RNG.integers(0, 3, 12)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return compile_bundle(module, (6,), optimizer=Adam())


def test_a_saved_bundle_trains_where_there_is_no_torch(bundle: Bundle, tmp_path: Path) -> None:
    program = """
import sys, numpy as np
from reft_edge.agent.trainer import Trainer
trainer = Trainer(sys.argv[1], threads=1)
inputs, targets = np.random.default_rng(0).standard_normal((12, 6), np.float32), np.arange(12) % 3
losses = [trainer.step(inputs, targets, 0.05) for _ in range(40)]
assert losses[-1] < 0.5 * losses[0], losses
assert not {"torch", "onnx"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(bundle.save(tmp_path))], check=True)


def test_state_survives_a_round_trip_and_steps_do_not_touch_what_was_handed_out(bundle: Bundle) -> None:
    trainer = Trainer(bundle, threads=1)
    trainer.step(INPUTS, TARGETS)
    handed = trainer.state()
    kept = {name: array.copy() for name, array in handed.items()}
    outputs = trainer.predict(INPUTS)
    trainer.step(INPUTS, TARGETS)
    trainer.step(INPUTS, TARGETS)
    assert all(np.array_equal(handed[name], kept[name]) for name in kept)
    trainer.load_state(kept)
    assert np.array_equal(trainer.predict(INPUTS), outputs)


def test_a_reset_optimizer_steps_as_a_fresh_one(bundle: Bundle) -> None:
    used, fresh = Trainer(bundle, threads=1), Trainer(bundle, threads=1)
    for _ in range(3):
        used.step(INPUTS, TARGETS)
    used.load_state(bundle.tensors())
    used.reset_optimizer()
    assert used.step(INPUTS, TARGETS) == fresh.step(INPUTS, TARGETS)
    assert all(np.array_equal(a, b) for a, b in zip(used.state().values(), fresh.state().values(), strict=True))


def test_parts_that_lie_apart_make_the_same_trainer(bundle: Bundle) -> None:
    parts = Trainer.from_parts(
        bundle.manifest, bundle.training_graph, bundle.inference_graph, bundle.tensors(), threads=1
    )
    assert parts.step(INPUTS, TARGETS) == Trainer(bundle, threads=1).step(INPUTS, TARGETS)


def test_evaluation_is_loss_and_accuracy(bundle: Bundle) -> None:
    trainer = Trainer(bundle, threads=1)
    loss, accuracy = trainer.evaluate(INPUTS, TARGETS, batch_size=5)
    outputs = torch.from_numpy(trainer.predict(INPUTS))
    assert loss == pytest.approx(nn.functional.cross_entropy(outputs, torch.from_numpy(TARGETS)).item(), rel=1e-5)
    assert accuracy == pytest.approx((outputs.argmax(1).numpy() == TARGETS).mean())


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (INPUTS[:, :5], TARGETS, "inputs have shape"),
        (INPUTS[:0], TARGETS[:0], "inputs have shape"),
        (INPUTS, TARGETS[:5], "targets have shape"),
        (INPUTS, TARGETS + 1, "classes 0 to 2"),
        (INPUTS, TARGETS.astype(np.float32), "targets are float32"),
        (INPUTS.astype(str), TARGETS, "inputs are"),
        (np.where(INPUTS > 1, np.nan, INPUTS), TARGETS, "NaN or infinite"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_changes(
    bundle: Bundle, inputs: np.ndarray, targets: np.ndarray, message: str
) -> None:
    trainer = Trainer(bundle, threads=1)
    with pytest.raises(DataError, match=message):
        trainer.step(inputs, targets)
    assert all(np.array_equal(array, trainer.state()[name]) for name, array in bundle.tensors().items())


def test_weights_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    tensors = bundle.tensors()
    for wrong in ({}, {**tensors, "x": tensors["0.bias"]}, {**tensors, "0.bias": tensors["3.bias"]}):
        with pytest.raises(BundleError, match="weights"):
            Trainer(bundle, threads=1).load_state(wrong)


def test_a_graph_that_is_not_the_manifests_is_refused(bundle: Bundle) -> None:
    other = compile_bundle(
        nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)), (6,), optimizer=SGD()
    )
    with pytest.raises(BundleError, match="training graph has"):
        Trainer.from_parts(bundle.manifest, other.training_graph, bundle.inference_graph, bundle.tensors())
