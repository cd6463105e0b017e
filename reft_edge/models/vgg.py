"""VGG with batch norm (Simonyan and Zisserman, arXiv 1409.1556), for small pictures.

`vgg16` on 3x32x32 with 10 outputs has 33,646,666 parameters (128.35 MiB) and 333.4 million multiply-accumulates: the
network of the REFT paper (arXiv 2308.13662, "128.4 MB" and "0.33 GFLOPs").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

Plan = Sequence[int | Literal["pool"]]
"""Output channels of each 3x3 convolution; `pool` halves the picture."""

VGG16: Plan = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
VGG_SMALL: Plan = (16, 16, "pool", 32, 32, "pool", 64, 64, "pool", 128, 128)
VGG_TINY: Plan = (16, "pool", 32, "pool", 64, "pool", 128)
DIGITS_CNN: Plan = (32, 48, "pool", 64, 96, "pool", 128)


class VGG(nn.Module):
    """Convolutions with batch norm and ReLU, average pooling to one pixel, then a classifier.

    Input: float32 (n_batch, n_channels, height, width). Output: (n_batch, n_outputs). `hidden` are the widths of the
    classifier's hidden layers, each followed by ReLU and dropout 0.5.
    """

    def __init__(self, input_shape: Sequence[int], n_outputs: int, plan: Plan, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        n_in = input_shape[0]
        layers: list[nn.Module] = []
        for step in plan:
            if step == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(n_in, step, 3, padding=1), nn.BatchNorm2d(step), nn.ReLU()]
                n_in = step
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        head: list[nn.Module] = []
        for n_out in hidden:
            head += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(0.5)]
            n_in = n_out
        self.classifier = nn.Sequential(*head, nn.Linear(n_in, n_outputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.classifier(self.pool(self.features(inputs)).flatten(1))
        return outputs


def vgg16(input_shape: Sequence[int], n_outputs: int) -> VGG:
    return VGG(input_shape, n_outputs, VGG16, hidden=(4096, 4096))


def vgg_small(input_shape: Sequence[int], n_outputs: int) -> VGG:
    """About 296,000 parameters and 13.4 million multiply-accumulates on 3x32x32."""
    return VGG(input_shape, n_outputs, VGG_SMALL)


def vgg_tiny(input_shape: Sequence[int], n_outputs: int) -> VGG:
    """About 99,000 parameters and 4.0 million multiply-accumulates on 3x32x32, for experiments that take minutes."""
    return VGG(input_shape, n_outputs, VGG_TINY)


def digits_cnn(input_shape: Sequence[int], n_outputs: int) -> VGG:
    """About 210,000 parameters and 3.1 million multiply-accumulates on 1x8x8, which is what the demo trains."""
    return VGG(input_shape, n_outputs, DIGITS_CNN)
