"""ResNet-18 (He et al., arXiv 1512.03385) for 32x32 pictures: a 3x3 stem with stride 1 and no first pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out))
            if stride != 1 or n_in != n_out
            else nn.Identity()
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


class ResNet(nn.Module):
    """Four stages of two basic blocks, of `width`, 2, 4 and 8 times `width` channels.

    Input: float32 (n_batch, n_channels, height, width). Output: (n_batch, n_outputs).
    """

    def __init__(self, input_shape: Sequence[int], n_outputs: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        n_in = width
        for stage in range(4):
            n_out = width * 2**stage
            blocks += [BasicBlock(n_in, n_out, 1 if stage == 0 else 2), BasicBlock(n_out, n_out, 1)]
            n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(n_in, n_outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.classifier(self.pool(self.blocks(self.stem(inputs))).flatten(1))
        return outputs


def resnet18(input_shape: Sequence[int], n_outputs: int) -> ResNet:
    return ResNet(input_shape, n_outputs)


def resnet_small(input_shape: Sequence[int], n_outputs: int) -> ResNet:
    """ResNet-18 with a quarter of the channels: about 700,000 parameters."""
    return ResNet(input_shape, n_outputs, width=16)
