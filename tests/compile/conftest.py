"""The reference: the same training in torch eager, and how close is close enough."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from reft_edge.agent.trainer import Trainer
from reft_edge.bundle.manifest import SGD, Adam, CrossEntropy, Loss, MeanSquaredError, Optimizer
from reft_edge.compile import compile_bundle

if TYPE_CHECKING:
    from collections.abc import Callable

    from reft_edge.types import Array

RELATIVE = 1e-4
LOSS = 1e-5


def torch_optimizer(options: Optimizer, module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if isinstance(options, Adam):
        return torch.optim.Adam(
            parameters,
            lr=learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            weight_decay=options.weight_decay,
        )
    return torch.optim.SGD(
        parameters,
        lr=learning_rate,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
    )


def torch_loss(loss: Loss) -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=loss.label_smoothing) if isinstance(loss, CrossEntropy) else nn.MSELoss()


def batches(
    module: nn.Module, shape: tuple[int, ...], loss: Loss, sizes: list[int], n_ids: int | None, seed: int = 0
) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    result = []
    for size in sizes:
        if n_ids is None:
            inputs = rng.standard_normal((size, *shape)).astype(np.float32)
        else:
            inputs = rng.integers(0, n_ids, (size, *shape))
        with torch.no_grad():
            output = copy.deepcopy(module).eval()(torch.from_numpy(inputs))
        if isinstance(loss, MeanSquaredError):
            targets = rng.standard_normal(output.shape).astype(np.float32)
        else:
            targets = rng.integers(0, output.shape[1], size)
        result.append((inputs, targets))
    return result


def difference(ours: Array, theirs: Array) -> float:
    """Largest difference relative to the tensor's scale."""
    scale = max(float(np.abs(theirs).max(initial=0)), 1e-3)
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0)) / scale


def assert_trains_like_torch(
    module: nn.Module,
    shape: tuple[int, ...],
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: float = 0.02,
    steps: int = 10,
    sizes: tuple[int, ...] = (8, 5),
    n_ids: int | None = None,
) -> Trainer:
    """Train both for `steps` batches and compare losses, every tensor of the state, and the evaluation mode."""
    loss, optimizer = loss or CrossEntropy(), optimizer or SGD(momentum=0.9, weight_decay=1e-3)
    bundle = compile_bundle(
        module, shape, loss=loss, optimizer=optimizer, input_dtype="float32" if n_ids is None else "int64"
    )
    trainer = Trainer(bundle, threads=1)
    reference = copy.deepcopy(module).train()
    solver, criterion = torch_optimizer(optimizer, reference, learning_rate), torch_loss(loss)
    data = batches(module, shape, loss, [sizes[i % len(sizes)] for i in range(steps)], n_ids)
    for number, (inputs, targets) in enumerate(data):
        solver.zero_grad()
        value = criterion(reference(torch.from_numpy(inputs)), torch.from_numpy(targets))
        value.backward()
        solver.step()
        found = trainer.step(inputs, targets, learning_rate)
        assert abs(found - value.item()) <= LOSS * max(1.0, abs(value.item())), f"loss of step {number}"
    state = trainer.state()
    expected = {name: tensor.detach().numpy() for name, tensor in reference.state_dict().items()}
    assert state.keys() == expected.keys()
    worst = {name: difference(state[name], expected[name]) for name in expected}
    assert max(worst.values()) <= RELATIVE, sorted(worst.items(), key=lambda item: -item[1])[:5]
    with torch.no_grad():
        outputs = reference.eval()(torch.from_numpy(data[0][0])).numpy()
    assert difference(trainer.predict(data[0][0]), outputs) <= RELATIVE
    return trainer


@pytest.fixture(name="assert_trains_like_torch", scope="session")
def _assert_trains_like_torch() -> Callable[..., Trainer]:
    return assert_trains_like_torch
