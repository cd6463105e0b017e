"""MobileNetV2 (Sandler et al., arXiv 1801.04381) for 32x32 pictures: the first two strides are 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

STAGES = (
    # expansion, channels, blocks, stride (table 2 of the paper; strides of the first stages lowered for 32x32)
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_norm(n_in: int, n_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(n_out)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, n_in: int, n_out: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        n_hidden = n_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_conv_norm(n_in, n_hidden, 1), nn.ReLU6()]
        layers += [*_conv_norm(n_hidden, n_hidden, 3, stride=stride, groups=n_hidden), nn.ReLU6()]
        layers += _conv_norm(n_hidden, n_out, 1)
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and n_in == n_out

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layers(inputs)
        return inputs + outputs if self.has_shortcut else outputs


class MobileNetV2(nn.Module):
    """Input: float32 (n_batch, n_channels, height, width). Output: (n_batch, n_outputs)."""

    def __init__(self, input_shape: Sequence[int], n_outputs: int, width: float = 1.0) -> None:
        super().__init__()
        n_in = _scaled(32, width)
        layers: list[nn.Module] = [*_conv_norm(input_shape[0], n_in, 3), nn.ReLU6()]
        for expansion, channels, n_blocks, stride in STAGES:
            n_out = _scaled(channels, width)
            for block in range(n_blocks):
                layers.append(InvertedResidual(n_in, n_out, expansion=expansion, stride=stride if block == 0 else 1))
                n_in = n_out
        n_last = _scaled(1280, max(1.0, width))
        self.features = nn.Sequential(*layers, *_conv_norm(n_in, n_last, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(n_last, n_outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.classifier(self.dropout(self.pool(self.features(inputs)).flatten(1)))
        return outputs


def _scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, but never down by more than a tenth."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


def mobilenet_v2(input_shape: Sequence[int], n_outputs: int) -> MobileNetV2:
    return MobileNetV2(input_shape, n_outputs)
