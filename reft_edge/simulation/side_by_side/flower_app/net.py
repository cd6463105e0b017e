"""The net that both sides train: 151,306 parameters (605 kB in float32) for 8 x 8 digits.

This file is copied to where each side looks for its model, so that there is one. Needs torch and nothing else.
"""

from __future__ import annotations

from torch import nn


def digits_net() -> nn.Module:
    """Two convolutions and two linear layers. Input: float32 (n_batch, 1, 8, 8). Output: (n_batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
