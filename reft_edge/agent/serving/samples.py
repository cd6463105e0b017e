"""Files to predict, in batches: pictures, folders of pictures, arrays (.npz) and tables (.csv).

Read as training data are, so that a model sees what it was trained on. A file that cannot be read is told of in its
place, and the others go on. Of pictures a batch is in memory at a time; a table is read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.agent.serving.onnx_model import OnnxModel
from reft_edge.agent.serving.predictor import ServedModel
from reft_edge.data.load import load_dataset
from reft_edge.data.pictures import pictures_below, read_picture
from reft_edge.data.settings import DataSettings
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from reft_edge.types import Array

TABLES = (".npz", ".csv")
MODELS = (".onnx", ".toml")
"""Which some would predict with, and name beside the files."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where a sample comes from."""

    file: Path
    index: int | None = None
    """In a table; a picture is one sample."""

    def __str__(self) -> str:
        return str(self.file) if self.index is None else f"{self.file}[{self.index}]"


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    """Samples for the model that they were read for."""

    samples: tuple[Sample, ...]
    inputs: Array
    """(n, *sample_shape), for `Predictor.predict`."""
    served: ServedModel


@dataclass(frozen=True, kw_only=True)
class UnreadableFile:
    """A file that gives no samples."""

    file: Path
    reason: str


def read_batches(
    paths: Sequence[Path],
    model: Callable[[], ServedModel],
    *,
    batch_size: int,
    data: DataSettings | None = None,
) -> Iterator[SampleBatch | UnreadableFile]:
    """The samples of `paths`, in their order.

    `model` is asked for each batch of pictures and each table, since another version may be served by then. `data` says
    how tables are read (`columns`, `target_column`, `window`, `stride`); targets are not read.
    """
    for is_table, files in groupby(_files(paths), key=_is_table):
        if is_table:
            for file in files:
                yield from _read_table(file, model(), batch_size, data)
        else:
            yield from _read_pictures(files, model, batch_size)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """Folders give way to their pictures; one without any stays, and cannot be read."""
    for path in paths:
        yield from (pictures_below(path) or [path]) if path.is_dir() else [path]


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES


def _read_pictures(
    files: Iterator[Path], model: Callable[[], ServedModel], batch_size: int
) -> Iterator[SampleBatch | UnreadableFile]:
    served = model()
    samples: list[Sample] = []
    pictures: list[Array] = []
    for file in files:
        if not samples:
            served = model()
        try:
            pictures.append(_read_picture(file, served.onnx))
        except DataError as exc:
            yield UnreadableFile(file=file, reason=str(exc))
            continue
        samples.append(Sample(file=file))
        if len(samples) == batch_size:
            yield SampleBatch(samples=tuple(samples), inputs=np.stack(pictures), served=served)
            samples, pictures = [], []
    if samples:
        yield SampleBatch(samples=tuple(samples), inputs=np.stack(pictures), served=served)


def _read_picture(file: Path, onnx: OnnxModel) -> Array:
    if file.suffix in MODELS:
        raise DataError(f"{file} is no file to predict; a model is named with --model")
    if file.is_dir():
        raise DataError(f"{file}: the folder has no pictures")
    if not file.exists():
        raise DataError(f"{file}: no such file")
    if not onnx.takes_pictures:
        raise DataError(f"{file}: the model takes no pictures but samples of shape {onnx.sample_shape} (.npz or .csv)")
    return read_picture(file, onnx.sample_shape)


def _read_table(
    file: Path, served: ServedModel, batch_size: int, data: DataSettings | None
) -> Iterator[SampleBatch | UnreadableFile]:
    settings = DataSettings(path=str(file)) if data is None else data
    settings = msgspec.structs.replace(settings, path=str(file.absolute()), function="", labelled=False, shape=())
    try:
        dataset = load_dataset(settings, base_dir=Path(), input_shape=served.onnx.sample_shape, compact=True)
    except DataError as exc:
        yield UnreadableFile(file=file, reason=str(exc))
        return
    for start in range(0, len(dataset), batch_size):
        inputs = dataset.inputs[start : start + batch_size]
        samples = tuple(Sample(file=file, index=start + index) for index in range(len(inputs)))
        yield SampleBatch(samples=samples, inputs=inputs, served=served)
