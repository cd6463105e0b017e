"""Properties of the partitions and of the demo's data."""

from __future__ import annotations

import numpy as np
import pytest

from reft_edge.errors import ConfigError
from reft_edge.simulation.digits import load_digits_split, write_part
from reft_edge.simulation.partition import dirichlet, iid


@pytest.mark.parametrize("alpha", [0.001, 0.5, 100.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_dirichlet_covers_exactly_in_equal_parts_and_is_the_same_for_the_same_seed(alpha, seed):
    labels = np.random.default_rng(7).choice([0, 1, 2, 7], 503, p=[0.7, 0.1, 0.1, 0.1])
    parts = dirichlet(labels, 6, alpha=alpha, seed=seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(503))
    assert {len(part) for part in parts} == {83, 84}
    again = dirichlet(labels, 6, alpha=alpha, seed=seed)
    assert all(map(np.array_equal, parts, again))


def test_a_smaller_alpha_gives_more_uneven_classes():
    labels = np.repeat(np.arange(10), 100)

    def unevenness(alpha):
        counts = np.array(
            [np.bincount(labels[part], minlength=10) for part in dirichlet(labels, 5, alpha=alpha, seed=0)]
        )
        return counts.std(axis=0).mean()

    assert unevenness(0.1) > unevenness(1.0) > unevenness(1000.0)


def test_iid_covers_exactly_with_sizes_that_differ_by_one_at_most():
    parts = iid(103, 4, seed=3)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(103))
    assert {len(part) for part in parts} == {25, 26}


@pytest.mark.parametrize(("alpha", "n_devices"), [(0.5, 101), (0.5, 0), (0.0, 2), (float("nan"), 2)])
def test_an_impossible_split_is_refused(alpha, n_devices):
    with pytest.raises(ConfigError):
        dirichlet(np.zeros(100, np.int64), n_devices, alpha=alpha, seed=0)


def test_digits_parts_are_disjoint_and_public_files_have_no_labels(tmp_path):
    digits = load_digits_split(4, alpha=0.5, seed=0)
    rows = np.concatenate([p.inputs.reshape(-1, 64) for p in (digits.test, digits.public, digits.private)])
    assert rows.shape == (1797, 64)
    assert rows.min() == 0.0
    assert rows.max() == 1.0
    from sklearn.datasets import load_digits

    expected = load_digits().data / 16
    assert np.array_equal(np.sort(rows.sum(axis=1)), np.sort(expected.astype(np.float32).sum(axis=1)))
    write_part(tmp_path / "a" / "public.npz", digits.public, labelled=False)
    with np.load(tmp_path / "a" / "public.npz") as stored:
        assert stored.files == ["inputs"]
