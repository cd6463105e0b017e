"""`[distillation]`: how the global model learns from the devices' variants. Values and defaults only, no torch.

Defaults were chosen by measurement; scripts/benchmarks/notes/accuracy.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PICTURE_AXES = 3
"""(channels, height, width)."""

WINDOW_AXES = 2
"""(columns, time): a sensor's window."""


class AugmentationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[distillation.augmentation]: what may change in a public input without changing what it shows.

    Off unless the user says so, because only the user knows: digits and text must not be flipped, and a table's row has
    nothing that could be moved.
    """

    flip: bool = False
    """Mirror half of the pictures, left to right."""
    shift: Annotated[int, Meta(ge=0, le=64)] = 0
    """Move pictures by up to this many pixels in each direction, windows by up to this many time steps; what the edge
    uncovers repeats the edge."""
    views: Annotated[int, Meta(ge=2, le=64)] = 4
    """Different versions of the public data, the plain one included. Each costs one pass of every teacher."""

    @property
    def n_views(self) -> int:
        """1 where nothing may change."""
        return self.views if self.flip or self.shift else 1

    def unfit_reason(self, input_shape: Sequence[int]) -> str:
        """Why inputs of this shape (without the batch axis) cannot be changed so; empty when they can."""
        n_axes = len(input_shape)
        if self.flip and n_axes != PICTURE_AXES:
            return f"flip is for pictures (channels, height, width); the model takes {tuple(input_shape)}"
        if self.shift and n_axes not in (PICTURE_AXES, WINDOW_AXES):
            return f"shift is for pictures and for windows (columns, time); the model takes {tuple(input_shape)}"
        if self.shift and self.shift >= min(input_shape[1:]):
            return f"shift = {self.shift} moves everything out of inputs of shape {tuple(input_shape)}"
        return ""


class DistillationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the global model learns from the teachers. `epochs = 0` turns distillation off."""

    epochs: Annotated[int, Meta(ge=0, le=10_000)] = 10
    batch_size: Annotated[int, Meta(ge=2, le=65_536)] = 64
    learning_rate: Annotated[float, Meta(gt=0, le=100)] = 1e-3
    """At the first step; it falls to 0 over the epochs along a cosine."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """`sgd` has momentum 0.9."""
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 4.0
    """On digits, 4 seeds: 4 gave 98.6% (worst round 97.8%), 2 gave 98.3% (96.1%); 1 is clearly worse."""
    weights: Literal["samples", "uniform", "agreement"] = "samples"
    """What a teacher counts: the samples that it was trained on, all the same, or by how well it agrees with the others
    (`coordinator.agreement`). Hostile devices teach as well: a robust `[aggregation]` needs `agreement`."""
    pooling: Literal["mean", "classes"] = "mean"
    """How teachers are joined: the mean of their probabilities, or class by class, where those count for a class who
    have seen it (`coordinator.pooling`). For classification only. `classes`, at a temperature of 2, is for one exchange
    with many local epochs: there it gained up to 6 points. With a few local epochs a round `mean` is as good, and
    better where devices see few classes each."""
    augmentation: AugmentationSettings = AugmentationSettings()
    held_out_fraction: Annotated[float, Meta(gt=0, lt=1)] = 0.25
    """Share of labelled public data that only chooses the best epoch. Unused without labels."""
    patience: Annotated[int, Meta(ge=1, le=10_000)] = 5
    """Stop after this many epochs without a better score on the held-out part. Unused without labels."""
