"""What both sides train: scikit-learn's digits over a few devices, evenly, and a fifth held out to measure accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.data.dataset import Dataset
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES, TEST_FRACTION
from reft_edge.simulation.partition import iid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reft_edge.types import Array

NET_FILE = Path(__file__).parent / "flower_app" / "net.py"
NET = "net:digits_net"
"""The model in `NET_FILE`, as federation.toml names one."""


class TaskSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The same for both sides."""

    devices: int = 4
    rounds: int = 10
    local_epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Disjoint parts that cover the data set."""

    test: Dataset
    devices: tuple[Dataset, ...]


def load_task_data(task: TaskSettings, *, seed: int, present: int | None = None) -> TaskData:
    """The digits: a fifth held out, the rest in parts of equal size and like classes.

    `present`: only the parts of the first so many devices are kept.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    whole = Dataset(
        inputs=(pixels / 16.0).astype(np.float32).reshape(-1, *INPUT_SHAPE),  # the set's grey levels are 0 to 16
        targets=labels.astype(np.int64),
    )
    order = np.random.default_rng(seed).permutation(len(labels))
    test_ids, private_ids = np.split(order, [int(len(labels) * TEST_FRACTION)])
    parts = iid(len(private_ids), task.devices, seed=seed)
    return TaskData(
        test=whole.take(np.sort(test_ids)),
        devices=tuple(whole.take(np.sort(private_ids[part])) for part in parts[:present]),
    )


def accuracy_of(weights: Mapping[str, Array], test: Dataset) -> float:
    """Share of the held-out samples that the net with these weights gets right; the judge of both sides."""
    import torch

    from reft_edge.coordinator.evaluation import evaluate
    from reft_edge.models.registry import build_model

    net = build_model(NET, input_shape=INPUT_SHAPE, n_outputs=N_CLASSES, base_dir=NET_FILE.parent)
    net.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    accuracy = evaluate(net, test).accuracy
    if accuracy is None:
        raise AssertionError("digits have classes")  # unreachable
    return accuracy
