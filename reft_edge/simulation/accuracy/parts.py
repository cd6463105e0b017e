"""The data of one run: private parts by Dirichlet, an unlabelled public part and a test part, all disjoint.

Sources: CIFAR-10 in its official binary form, a folder with `train/` and `test/` of pictures by class, or, without a
folder, the digits. Private and public parts come from the training set, the test part from the test set. Only chosen
pictures are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from reft_edge.data.dataset import Dataset
from reft_edge.data.pictures import list_pictures, read_pictures
from reft_edge.data.settings import DataSettings
from reft_edge.errors import DataError
from reft_edge.simulation.digits import load_digits_split
from reft_edge.simulation.partition import dirichlet

if TYPE_CHECKING:
    from reft_edge.simulation.accuracy.records import AccuracySettings, DataKind
    from reft_edge.types import Array, IntArray

CIFAR_SHAPE = (3, 32, 32)
"""(channels, height, width): red, green and blue plane, each row by row."""
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
"""A label and a picture (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version")."""
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Disjoint parts. `devices` together are the private data; `public` has no targets."""

    devices: tuple[Dataset, ...]
    public: Dataset
    test: Dataset
    n_classes: int

    @property
    def private(self) -> Dataset:
        """What central training uses."""
        return Dataset(
            inputs=np.concatenate([part.inputs for part in self.devices]),
            targets=np.concatenate([part.targets for part in self.devices if part.targets is not None]),
        )


class Source(Protocol):
    """Labelled samples of which only some are wanted."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, which: IntArray) -> Dataset: ...


def kind_of(folder: Path | None) -> DataKind:
    """What a folder holds. Raises `DataError`."""
    if folder is None:
        return "digits"
    if _batch_files(folder):
        return "cifar10"
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return "pictures"
    raise DataError(
        f"{folder} has neither data_batch_1.bin (CIFAR-10, binary version) nor train/ and test/ with pictures by class"
    )


def load_parts(folder: Path | None, settings: AccuracySettings, *, alpha: float, seed: int) -> Parts:
    """The parts of one seed; the test part does not depend on `alpha`. Raises `DataError`."""
    n_devices = len(settings.ratios)
    if folder is None:
        digits = load_digits_split(n_devices, alpha=alpha, seed=seed)
        public = replace(digits.public, targets=None)
        return Parts(devices=digits.devices, public=public, test=digits.test, n_classes=10)
    training, test = _sources(folder, settings.input_shape)
    rng = np.random.default_rng(seed)
    n_wanted = settings.n_private + settings.n_public
    if len(training) < n_wanted or len(test) < settings.n_test:
        raise DataError(
            f"{folder} has {len(training)} training and {len(test)} test samples; "
            f"{n_wanted} and {settings.n_test} are needed"
        )
    chosen = rng.permutation(len(training))[:n_wanted]
    private = training.read(np.sort(chosen[: settings.n_private]))
    public = training.read(np.sort(chosen[settings.n_private :]))
    labels = private.targets
    if labels is None:
        raise DataError(f"{folder}: the pictures have no classes; expected train/<class>/<name>.png")
    parts = dirichlet(labels, n_devices, alpha=alpha, seed=seed)
    return Parts(
        devices=tuple(private.take(part) for part in parts),
        public=replace(public, targets=None, classes=()),
        test=test.read(np.sort(rng.permutation(len(test))[: settings.n_test])),
        n_classes=len(training.classes),
    )


def _sources(folder: Path, shape: tuple[int, ...]) -> tuple[Source, Source]:
    if files := _batch_files(folder):
        root = files[0].parent
        return _Binary(files), _Binary([root / "test_batch.bin"])
    training, test = _Pictures(folder / "train", shape), _Pictures(folder / "test", shape)
    if training.classes != test.classes:
        raise DataError(f"{folder}: train/ has the classes {training.classes}, test/ has {test.classes}")
    return training, test


def _batch_files(folder: Path) -> list[Path]:
    """The official archive has its files in a folder `cifar-10-batches-bin`."""
    for root in (folder, folder / "cifar-10-batches-bin"):
        if files := sorted(root.glob("data_batch_*.bin")):
            return files
    return []


class _Binary:
    classes = CIFAR_CLASSES

    def __init__(self, files: Sequence[Path]) -> None:
        records = [_read_records(path) for path in files]
        self._records = np.concatenate(records)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, which: IntArray) -> Dataset:
        chosen = self._records[which]
        return Dataset(
            inputs=chosen[:, 1:].reshape(-1, *CIFAR_SHAPE), targets=chosen[:, 0].astype(np.int64), classes=self.classes
        )


def _read_records(path: Path) -> Array:
    """uint8 (n, CIFAR_RECORD_BYTES)."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    if content.size == 0 or content.size % CIFAR_RECORD_BYTES:
        raise DataError(f"{path} has {content.size} bytes, no multiple of {CIFAR_RECORD_BYTES}; download it again")
    records = content.reshape(-1, CIFAR_RECORD_BYTES)
    if (highest := int(records[:, 0].max())) >= len(CIFAR_CLASSES):
        raise DataError(f"{path} has class {highest}; CIFAR-10 has 0 to {len(CIFAR_CLASSES) - 1}")
    return records


class _Pictures:
    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._folder = folder
        self._shape = shape
        self.classes, self._files = list_pictures(folder)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, which: IntArray) -> Dataset:
        files = [self._files[index] for index in which]
        rows = list(read_pictures(self._folder, files, DataSettings(path=str(self._folder)), self._shape))
        return Dataset(
            inputs=np.stack([picture for _, _, picture in rows]),
            targets=np.array([target for _, target, _ in rows], np.int64) if self.classes else None,
            classes=self.classes,
        )
