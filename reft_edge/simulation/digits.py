"""The demo's data: scikit-learn's 1,797 handwritten digits, 8 x 8, with public and test parts held out.

They come with scikit-learn, so nothing is downloaded. Public samples are written without labels: distillation does not
need them, and nobody should wonder whether it peeked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reft_edge.data.dataset import Dataset
from reft_edge.errors import DataError
from reft_edge.simulation.partition import dirichlet

INPUT_SHAPE = (1, 8, 8)
N_CLASSES = 10
TEST_FRACTION = 0.2
PUBLIC_FRACTION = 0.2
"""The rest, 1,079 samples, is private."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Disjoint parts that cover the data set; `devices` together are the private data."""

    test: Dataset
    public: Dataset
    devices: tuple[Dataset, ...]

    @property
    def private(self) -> Dataset:
        """The pooled private data: what central training would use."""
        return Dataset(
            inputs=np.concatenate([part.inputs for part in self.devices]),
            targets=np.concatenate([part.targets for part in self.devices if part.targets is not None]),
        )


def load_digits_split(n_devices: int, *, alpha: float, seed: int) -> Digits:
    """Split the digits into test, public and, by Dirichlet(`alpha`), `n_devices` private parts."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    labels = labels.astype(np.int64)
    whole = Dataset(
        inputs=(pixels / 16.0).astype(np.float32).reshape(-1, *INPUT_SHAPE),  # the set's grey levels are 0 to 16
        targets=labels,
    )
    order = np.random.default_rng(seed).permutation(len(labels))
    n_test, n_public = int(len(labels) * TEST_FRACTION), int(len(labels) * PUBLIC_FRACTION)
    test_ids, public_ids, private_ids = (np.sort(ids) for ids in np.split(order, [n_test, n_test + n_public]))
    parts = dirichlet(labels[private_ids], n_devices, alpha=alpha, seed=seed)
    return Digits(
        test=whole.take(test_ids),
        public=whole.take(public_ids),
        devices=tuple(whole.take(private_ids[part]) for part in parts),
    )


def write_part(path: Path, part: Dataset, *, labelled: bool = True) -> None:
    """Write `part` as an `.npz` with `inputs` and, when `labelled` and known, `targets`. Raises `DataError`."""
    arrays = {"inputs": part.inputs}
    if labelled and part.targets is not None:
        arrays["targets"] = part.targets
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy types allow_pickle into the keywords
    except OSError as exc:
        raise DataError(f"{path} cannot be written: {exc.strerror or exc}") from exc
