"""Arrays from `.npz` and features from `.csv`.

A CSV is read row by row into packed doubles, so memory is eight bytes a number and not Python's thirty.
"""

from __future__ import annotations

import csv
import zipfile
from array import array
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.config import did_you_mean
from reft_edge.data.dataset import Dataset
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from reft_edge.data.settings import DataSettings
    from reft_edge.types import Array


def load_npz(path: Path, settings: DataSettings) -> Dataset:
    """Arrays `inputs` (n, ...) and, unless unlabelled, `targets` (n,) or (n, ...). uint8 inputs are pictures.

    An array `recordings` (n,) of numbers says which samples are one recording's.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "inputs" not in archive.files:
                raise DataError(f"{path} has no array 'inputs'; it has {', '.join(archive.files) or 'none'}")
            inputs = archive["inputs"]
            targets = archive["targets"] if settings.labelled and "targets" in archive.files else None
            recordings = archive["recordings"].astype(np.int64) if "recordings" in archive.files else None
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, EOFError, zipfile.BadZipFile) as exc:  # numpy would advise to unpickle it
        raise DataError(
            f"{path} is no .npz of plain arrays; write it with numpy's savez(path, inputs=..., ...)"
        ) from exc
    classes = settings.classes if targets is not None else ()
    try:
        return Dataset(inputs=inputs, targets=targets, classes=classes, recordings=recordings)
    except DataError as exc:
        raise DataError(f"{path}: {exc}") from exc


def load_csv(path: Path, settings: DataSettings) -> Dataset:
    """Features by column, with a header line; see `DataSettings` for target columns and windows."""
    target_columns = settings.target_columns if settings.labelled else ()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise DataError(f"{path} is empty; its first line must name the columns")
            features = list(settings.columns) or [name for name in header if name not in settings.target_columns]
            picked = [_column(header, name, path) for name in features]
            target_picked = [_column(header, name, path) for name in target_columns]
            if not picked:
                raise DataError(f"{path} has no feature columns")
            values, labels = _read_rows(reader, picked, target_picked, header, path)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path} cannot be read as CSV: {exc}") from exc
    rows = np.frombuffer(values, dtype=np.float64).reshape(-1, len(picked))
    targets, classes = _targets(labels, len(target_picked), settings.classes, path)
    if settings.window:
        rows, targets = _windows(rows, targets, settings.window, settings.stride or settings.window, path)
    return Dataset(inputs=rows, targets=targets, classes=classes)


def _column(header: Sequence[str], name: str, path: Path) -> int:
    if name not in header:
        raise DataError(f"{path} has no column {name!r}{did_you_mean(name, list(header))}")
    return header.index(name)


def _read_rows(
    reader: Iterable[list[str]], picked: Sequence[int], target_picked: Sequence[int], header: Sequence[str], path: Path
) -> tuple[array[float], list[str]]:
    """Feature values row after row, and target texts row after row."""
    values: array[float] = array("d")
    labels: list[str] = []
    for number, row in enumerate(reader, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(f"{path}, row {number}: {len(row)} values, the header has {len(header)}")
        for index in picked:
            try:
                values.append(float(row[index]))
            except ValueError as exc:
                where = f"{path}, row {number}, column {header[index]!r}"
                raise DataError(f"{where}: {row[index]!r} is not a number") from exc
        labels.extend(row[index].strip() for index in target_picked)
    return values, labels


def _targets(
    labels: list[str], n_columns: int, names: tuple[str, ...], path: Path
) -> tuple[Array | None, tuple[str, ...]]:
    """Whole numbers are class indices, other numbers values, anything else class names; several columns are values."""
    if n_columns == 0:
        return None, ()
    if n_columns == 1 and all(label.isdecimal() for label in labels):
        return np.array([int(label) for label in labels], dtype=np.int64), names
    try:
        return np.array([float(label) for label in labels]).reshape(-1, n_columns), ()
    except ValueError as exc:
        if n_columns > 1:
            raise DataError(f"{path}: several target columns must all be numbers ({exc})") from exc
    known = names or tuple(sorted(set(labels)))
    for label in labels:
        if label not in known:
            raise DataError(f"{path}: class {label!r} is not one of classes{did_you_mean(label, known)}")
    place = {name: index for index, name in enumerate(known)}
    return np.array([place[label] for label in labels], dtype=np.int64), known


def _windows(rows: Array, targets: Array | None, window: int, stride: int, path: Path) -> tuple[Array, Array | None]:
    """Windows (n, columns, window). The last row's target counts; windows over a change of class are left out."""
    starts = np.arange(0, len(rows) - window + 1, stride)
    if targets is not None and targets.dtype.kind == "i":
        changes = np.concatenate([[0], np.cumsum(targets[1:] != targets[:-1])])
        starts = starts[changes[starts] == changes[starts + window - 1]]
    if len(starts) == 0:
        raise DataError(f"{path}: {len(rows)} rows hold no whole window of {window}")
    samples = np.stack([rows[start : start + window].T for start in starts])
    return samples, None if targets is None else targets[starts + window - 1]
