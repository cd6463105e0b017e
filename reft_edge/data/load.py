"""Read a dataset from where its settings say: pictures, `.npz`, `.csv` or a function of the user's.

Every loader returns arrays; the checks that hold for all of them (finite, labels in range, classes known, shape fits)
are here, once. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.data.custom import load_function
from reft_edge.data.dataset import Dataset, map_classes, scale
from reft_edge.data.pictures import load_pictures
from reft_edge.data.tables import load_csv, load_npz
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from reft_edge.data.settings import DataSettings
    from reft_edge.types import Array


def load_dataset(
    settings: DataSettings,
    *,
    base_dir: Path,
    input_shape: Sequence[int] | None = None,
    classes: Sequence[str] = (),
    compact: bool = False,
) -> Dataset:
    """All samples of one source, in the order of the files.

    `base_dir` is the folder that relative paths start from. `input_shape` is one sample's shape in the model, for
    example (3, 32, 32); pictures are converted and resized to it. `classes` is the federation's order of classes:
    targets are indices into it. `compact` keeps pictures as uint8 (see `Dataset`); else inputs are float32 or int64.
    Raises `DataError` with one line that names what is wrong and where.
    """
    shape = tuple(settings.shape) or (tuple(input_shape) if input_shape is not None else None)
    where = settings.function
    if settings.function:
        dataset = load_function(settings, base_dir)
    else:
        path = base_dir / settings.path
        where = str(path)
        if path.is_dir():
            dataset = load_pictures(path, settings, shape)
        elif not path.exists():
            raise DataError(f"{path} does not exist; [data] path names a folder of pictures, an .npz or a .csv file")
        elif path.suffix == ".npz":
            dataset = load_npz(path, settings)
        elif path.suffix == ".csv":
            dataset = load_csv(path, settings)
        else:
            raise DataError(f"{path} is neither a folder nor an .npz or .csv file; use function for other formats")
    dataset = _check(dataset, where)
    if shape is not None:
        dataset = replace(dataset, inputs=_reshape(dataset.inputs, shape, where))
    dataset = _federation_classes(dataset, tuple(classes), where)
    return dataset if compact else replace(dataset, inputs=scale(dataset.inputs))


def _check(dataset: Dataset, where: str) -> Dataset:
    """Dtypes as `Dataset` promises, and nothing that would spoil training."""
    if dataset.inputs.size == 0:
        raise DataError(f"{where}: there are no samples")
    inputs = _as_known_dtype(dataset.inputs, where, "inputs")
    targets = dataset.targets
    if targets is not None:
        targets = _as_known_dtype(targets, where, "targets")
        targets = targets.astype(np.int64) if targets.dtype == np.uint8 else targets
        if targets.ndim == 2 and targets.shape[1] == 1 and targets.dtype == np.int64:
            targets = targets[:, 0]
        if targets.dtype == np.int64 and targets.min() < 0:
            raise DataError(
                f"{where}: sample {int(targets.argmin())} has class {int(targets.min())}; classes start at 0"
            )
        if targets.dtype == np.int64 and dataset.classes and targets.max() >= len(dataset.classes):
            raise DataError(
                f"{where}: sample {int(targets.argmax())} has class {int(targets.max())}, "
                f"but there are {len(dataset.classes)} class names"
            )
    return replace(dataset, inputs=inputs, targets=targets)


def _as_known_dtype(values: Array, where: str, what: str) -> Array:
    """float32, int64 or uint8; raises `DataError` for text, and for numbers that are not finite."""
    if values.dtype == np.uint8 or values.dtype == np.int64:
        return values
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    if values.dtype.kind != "f":
        raise DataError(f"{where}: {what} has dtype {values.dtype}; it must be numbers")
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if bad.any():
        raise DataError(f"{where}: {what} of sample {int(bad.argmax())} are not finite ({int(bad.sum())} such samples)")
    with np.errstate(over="ignore"):
        single = values.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        raise DataError(f"{where}: {what} has values beyond the range of float32; scale the data")
    return single


def _reshape(inputs: Array, shape: tuple[int, ...], where: str) -> Array:
    """`inputs` with samples of `shape`. Only flat samples and axes of length 1 are rearranged."""
    found = inputs.shape[1:]
    if found == shape:
        return inputs
    flat = len(found) <= 1 and prod(found) == prod(shape)
    if flat or [size for size in found if size != 1] == [size for size in shape if size != 1]:
        return inputs.reshape(len(inputs), *shape)
    hint = ""
    if len(shape) == 3 and found == (*shape[1:], shape[0]):
        hint = "; these look like (height, width, channels): store (channels, height, width)"
    raise DataError(f"{where}: a sample has shape {found}, the model takes {shape}{hint}")


def _federation_classes(dataset: Dataset, classes: tuple[str, ...], where: str) -> Dataset:
    """Targets as indices into `classes`, which may be empty: then the data's own order stays."""
    targets = dataset.targets
    if not classes or targets is None or targets.dtype != np.int64:
        return dataset
    if dataset.classes:
        used = np.unique(targets)
        table = np.full(len(dataset.classes), -1, dtype=np.int64)
        table[used] = map_classes([dataset.classes[index] for index in used], classes, where=where)
        return replace(dataset, targets=table[targets], classes=classes)
    if targets.max() >= len(classes):
        raise DataError(f"{where}: class {int(targets.max())} is outside the federation's 0 to {len(classes) - 1}")
    return replace(dataset, classes=classes)
