"""Views: versions of the public inputs that show the same, flipped and moved a little.

Teachers and student see the very same view, so a target is always what the teachers say about what the student sees
("function matching", Beyer et al., arXiv 2106.05237: with consistent views and patience, distilling
generalises where fixed targets overfit). A view is drawn from the seed, so nothing is kept but its teachers' outputs.

Which changes keep the meaning depends on the kind of input (`AugmentationSettings.unfit_reason`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.coordinator.distillation_settings import PICTURE_AXES, AugmentationSettings
from reft_edge.errors import ConfigError

if TYPE_CHECKING:
    from reft_edge.types import Array, IntArray


@dataclass(frozen=True, kw_only=True)
class Views:
    """`inputs` (n, *sample_shape) in `len` versions; number 0 is the plain one.

    Raises `ConfigError` for inputs of a kind that the settings cannot change.
    """

    inputs: Array
    settings: AugmentationSettings
    seed: int

    def __post_init__(self) -> None:
        if reason := self.settings.unfit_reason(self.inputs.shape[1:]):
            raise ConfigError(f"[distillation.augmentation] {reason}")

    def __len__(self) -> int:
        return self.settings.n_views

    def view(self, number: int) -> Array:
        """All inputs in version `number`, made anew by each call: same shape, same dtype, same order."""
        if not 0 <= number < len(self):
            raise IndexError(f"there is no view {number}; there are {len(self)}")
        if number == 0:
            return self.inputs
        rng = np.random.default_rng([self.seed, number])
        changed = self.inputs
        if self.settings.flip:
            mirrored = rng.random(len(changed)) < 0.5
            changed = np.where(_over_samples(mirrored, changed.ndim), changed[..., ::-1], changed)
        if self.settings.shift:
            for axis in (-2, -1) if changed.ndim == PICTURE_AXES + 1 else (-1,):
                steps = rng.integers(-self.settings.shift, self.settings.shift + 1, len(changed))
                changed = _moved(changed, steps, axis)
        return changed


def _moved(inputs: Array, steps: IntArray, axis: int) -> Array:
    """Each sample moved by its number of steps along `axis`; the edge is repeated."""
    size = inputs.shape[axis]
    sources = np.clip(np.arange(size) - steps[:, None], 0, size - 1)
    shape = [1] * inputs.ndim
    shape[0], shape[axis] = len(inputs), size
    moved: Array = np.take_along_axis(inputs, sources.reshape(shape), axis=axis)
    return moved


def _over_samples(values: Array, ndim: int) -> Array:
    return values.reshape(-1, *[1] * (ndim - 1))
