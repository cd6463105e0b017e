"""A 1-D convolutional network for windows of sensor readings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class SensorCNN(nn.Module):
    """Three strided convolutions with batch norm, mean over time, a linear layer.

    Input: float32 (n_batch, n_sensors, n_readings). Output: (n_batch, n_outputs).
    """

    def __init__(self, input_shape: Sequence[int], n_outputs: int, widths: Sequence[int] = (32, 64, 96)) -> None:
        super().__init__()
        n_in = input_shape[0]
        layers: list[nn.Module] = []
        for n_out in widths:
            layers += [nn.Conv1d(n_in, n_out, 5, stride=2, padding=2), nn.BatchNorm1d(n_out), nn.ReLU()]
            n_in = n_out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.classifier = nn.Linear(n_in, n_outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.classifier(self.pool(self.features(inputs)).flatten(1))
        return outputs


def sensor_cnn(input_shape: Sequence[int], n_outputs: int) -> SensorCNN:
    return SensorCNN(input_shape, n_outputs)
