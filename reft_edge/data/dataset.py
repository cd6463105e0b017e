"""Samples in memory: what every loader returns, and what training, evaluation and distillation read.

Pictures may be held as bytes (uint8), a quarter of the memory of floats; `samples` and `batches` scale them to [0, 1]
when they are needed. Nothing here touches a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.config import did_you_mean
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from reft_edge.types import Array, IntArray

PICTURE_SCALE = np.float32(1 / 255)
"""Bytes become floats in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples and perhaps their targets.

    `inputs`: (n, *sample_shape), float32, int64, or uint8 for pictures held as bytes.
    `targets`: int64 (n,) class indices, float32 (n, ...) values, or None when unlabelled.
    `classes`: names of the class indices; empty when they have none.
    `recordings`: int64 (n,), which samples are one recording's, as overlapping windows are; None: each stands alone.
    """

    inputs: Array
    targets: Array | None = None
    classes: tuple[str, ...] = ()
    recordings: IntArray | None = None

    def __post_init__(self) -> None:
        if self.inputs.ndim == 0 or (self.targets is not None and self.targets.ndim == 0):
            raise DataError("inputs or targets are a single value; the first axis must be the samples")
        if self.targets is not None and len(self.targets) != len(self.inputs):
            raise DataError(f"there are {len(self.inputs)} inputs and {len(self.targets)} targets; give one for each")
        if self.recordings is not None and self.recordings.shape != (len(self.inputs),):
            raise DataError(
                f"there are {len(self.inputs)} inputs, and recordings has shape {self.recordings.shape}; "
                "give one number for each"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    @property
    def n_classes(self) -> int | None:
        """Number of classes, None for regression and for unlabelled samples."""
        if self.targets is None or self.targets.dtype.kind != "i":
            return None
        return len(self.classes) or int(self.targets.max(initial=-1)) + 1

    def samples(self, which: IntArray | slice) -> Array:
        """Inputs as the model takes them: float32 in [0, 1] for pictures, else unchanged."""
        return scale(self.inputs[which])

    def take(self, indices: IntArray) -> Dataset:
        targets = None if self.targets is None else self.targets[indices]
        recordings = None if self.recordings is None else self.recordings[indices]
        return replace(self, inputs=self.inputs[indices], targets=targets, recordings=recordings)

    def split(self, holdout_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Training and holdout part, the same for the same seed.

        Classes keep their shares, and each class keeps at least one sample for training. A recording is on one side,
        whole: windows of one are too alike to measure with. Its first sample's class is taken for that of all.
        """
        rng = np.random.default_rng(seed)
        mask = np.zeros(len(self), dtype=np.bool_)
        if self.recordings is None:
            for group in self._groups():
                n_held = min(round(len(group) * holdout_fraction), len(group) - 1)
                mask[rng.permutation(group)[:n_held]] = True
        else:
            _, firsts, recording_of, sizes = np.unique(
                self.recordings, return_index=True, return_inverse=True, return_counts=True
            )
            for group in self.take(firsts)._groups():
                order = rng.permutation(group)
                held_sizes = np.concatenate([[0], np.cumsum(sizes[order])])
                nearest = int(np.abs(held_sizes[:-1] - held_sizes[-1] * holdout_fraction).argmin())
                mask |= np.isin(recording_of, order[:nearest])
        return self.take(np.flatnonzero(~mask)), self.take(np.flatnonzero(mask))

    def for_model(
        self,
        *,
        input_shape: Sequence[int],
        input_dtype: str = "float32",
        target_shape: Sequence[int] = (),
        target_dtype: str = "int64",
        n_outputs: int | None = None,
    ) -> Dataset:
        """The same samples in the dtypes and shapes of a model.

        `n_outputs` bounds class indices. Raises `DataError` for what does not fit.
        """
        if self.sample_shape != tuple(input_shape):
            raise DataError(f"a sample has shape {self.sample_shape}, the model takes {tuple(input_shape)}")
        inputs = _cast(self.inputs, input_dtype, "inputs")
        if self.targets is None:
            return replace(self, inputs=inputs)
        targets = self.targets
        if target_dtype == "float32" and targets.dtype.kind == "i" and self.classes:
            raise DataError("the model predicts numbers, but the targets are classes; name a column of numbers")
        if prod(targets.shape[1:]) == prod(target_shape):
            targets = targets.reshape(len(targets), *target_shape)
        else:
            raise DataError(f"a target has shape {targets.shape[1:]}, the model's has {tuple(target_shape)}")
        targets = _cast(targets, target_dtype, "targets")
        if targets.dtype.kind == "i" and len(targets) and n_outputs is not None:
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= n_outputs:
                raise DataError(f"class {low if low < 0 else high} is outside the model's 0 to {n_outputs - 1}")
        return replace(self, inputs=inputs, targets=targets)

    def _groups(self) -> list[IntArray]:
        """Indices by class; one group when there are no classes."""
        if self.targets is None or self.targets.dtype.kind != "i" or self.targets.ndim != 1:
            return [np.arange(len(self))] if len(self) else []
        order = np.argsort(self.targets, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.targets[order])) + 1) if len(order) else []


def scale(inputs: Array) -> Array:
    """uint8 to float32 in [0, 1]; other dtypes unchanged."""
    return inputs * PICTURE_SCALE if inputs.dtype == np.uint8 else inputs


def n_batches(n_samples: int, batch_size: int) -> int:
    """How many batches `batches` yields."""
    full, rest = divmod(n_samples, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def batches(dataset: Dataset, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """One epoch in random order: inputs (b, *sample_shape) and targets, b at most `batch_size`.

    A last batch of one sample is left out unless it is the only one: batch normalization has no variance there.
    Raises `DataError` when there are no targets.
    """
    if dataset.targets is None:
        raise DataError("the samples have no targets; training needs them")
    order = rng.permutation(len(dataset))
    for index in range(n_batches(len(dataset), batch_size)):
        chosen = order[index * batch_size : (index + 1) * batch_size]
        yield dataset.samples(chosen), dataset.targets[chosen]


def map_classes(own: Sequence[str], known: Sequence[str], *, where: str) -> IntArray:
    """Index in `known` for each name in `own`; raises `DataError` for a class that the federation does not know."""
    for name in own:
        if name not in known:
            raise DataError(f"{where}: class {name!r} is not one of the federation's{did_you_mean(name, list(known))}")
    return np.array([list(known).index(name) for name in own], dtype=np.int64)


def _cast(values: Array, dtype: str, what: str) -> Array:
    """`values` as `dtype`; floats become integers only without loss. Bytes that mean pictures stay bytes."""
    if dtype == "int64" and values.dtype.kind == "f":
        integers = values.astype(np.int64)
        if not np.array_equal(integers, values):
            raise DataError(f"the model takes whole numbers as {what}, but the data have fractions")
        return integers
    if dtype == "float32" and values.dtype == np.uint8:
        return values
    return values.astype(dtype, copy=False)
