"""How much data there is and of what kind: numbers for the announcement, never samples.

Reads everything once, so that a broken picture or a wrong column is met when the agent starts and not in a round; holds
one picture at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reft_edge.data.dataset import Dataset
from reft_edge.data.description import DataDescription
from reft_edge.data.load import load_dataset
from reft_edge.data.pictures import list_pictures, read_pictures
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from reft_edge.data.settings import DataSettings


def describe_dataset(settings: DataSettings, *, base_dir: Path, split_seed: int) -> DataDescription:
    """Read all samples and count them, split as `Dataset.split` will do it. Raises `DataError`."""
    folder = base_dir / settings.path
    pictures = bool(settings.path) and folder.is_dir()
    if pictures:
        dataset, shape = _without_pixels(folder, settings)
    else:
        dataset = load_dataset(settings, base_dir=base_dir, compact=True)
        shape = dataset.sample_shape
    if dataset.targets is None:
        raise DataError(
            f"{settings.path or settings.function}: the samples have no targets, which training needs: a folder for "
            "each class, an array `targets`, or target_column for a .csv"
        )
    training, holdout = dataset.split(settings.holdout_fraction, split_seed)
    return DataDescription(
        training_samples=len(training),
        holdout_samples=len(holdout),
        input_shape=shape,
        n_classes=dataset.n_classes,
        classes=dataset.classes,
        pictures=pictures,
    )


def _without_pixels(folder: Path, settings: DataSettings) -> tuple[Dataset, tuple[int, ...]]:
    """The pictures' targets beside samples of no pixels, and the pictures' common shape, () when sizes differ."""
    classes, files = list_pictures(folder)
    shapes: set[tuple[int, ...]] = set()
    targets: list[int] = []
    for _, target, picture in read_pictures(folder, files, settings, settings.shape or None):
        shapes.add(picture.shape)
        targets.append(target)
    labelled = bool(classes) and settings.labelled
    dataset = Dataset(
        inputs=np.empty((len(targets), 0), dtype=np.uint8),
        targets=np.array(targets, dtype=np.int64) if labelled else None,
        classes=classes if labelled else (),
    )
    return dataset, shapes.pop() if len(shapes) == 1 else ()
