"""Multilayer perceptron: for feature tables and other small, flat inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import nn


class MLP(nn.Module):
    """Fully connected layers with batch norm and ReLU.

    Input: float32 (n_batch, *input_shape), flattened. Output: (n_batch, n_outputs).
    """

    def __init__(self, input_shape: Sequence[int], n_outputs: int, hidden: Sequence[int] = (256, 128)) -> None:
        super().__init__()
        sizes = [prod(input_shape), *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(sizes[-1], n_outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.classifier(self.features(inputs.flatten(1)))
        return outputs


def mlp(input_shape: Sequence[int], n_outputs: int) -> MLP:
    return MLP(input_shape, n_outputs)
