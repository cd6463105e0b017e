"""Splitting, batching and fitting samples to a model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.data.dataset import Dataset, batches, n_batches
from reft_edge.errors import DataError


def numbered(labels: list[int]) -> Dataset:
    return Dataset(inputs=np.arange(len(labels), dtype=np.float32)[:, None], targets=np.array(labels, dtype=np.int64))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 0.9), st.integers(0, 3))
def test_a_split_is_a_partition_that_keeps_every_class_in_training(
    labels: list[int], fraction: float, seed: int
) -> None:
    data = numbered(labels)
    training, holdout = data.split(fraction, seed)
    assert sorted([*training.inputs[:, 0], *holdout.inputs[:, 0]]) == list(range(len(labels)))
    assert set(training.targets) == set(labels)
    for label in set(labels):
        assert abs((holdout.targets == label).sum() - labels.count(label) * fraction) <= 1
    again = data.split(fraction, seed)[1]
    np.testing.assert_array_equal(again.inputs, holdout.inputs)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=20),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_a_recording_is_on_one_side_of_a_split(lengths: list[tuple[int, int]], fraction: float, seed: int) -> None:
    labels = [label for label, n in lengths for _ in range(n)]
    recordings = np.array([index for index, (_, n) in enumerate(lengths) for _ in range(n)], dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    data = dataclasses.replace(numbered(labels), recordings=recordings).take(shuffled)
    training, holdout = data.split(fraction, seed)
    assert sorted([*training.inputs[:, 0], *holdout.inputs[:, 0]]) == list(range(len(labels)))
    assert not set(training.recordings) & set(holdout.recordings)
    assert set(training.targets) == set(labels)
    for label in set(labels):
        longest = max(n for each, n in lengths if each == label)  # that one stays for training, at most
        assert abs((holdout.targets == label).sum() - labels.count(label) * fraction) <= longest


def test_recordings_need_a_number_for_each_sample() -> None:
    with pytest.raises(DataError, match=r"there are 2 inputs, and recordings has shape \(1,\)"):
        dataclasses.replace(numbered([0, 1]), recordings=np.array([0]))


@given(st.integers(1, 40), st.integers(1, 12))
def test_an_epoch_shows_each_sample_at_most_once_in_batches_of_more_than_one(n: int, batch_size: int) -> None:
    seen = list(batches(numbered([0] * n), batch_size, np.random.default_rng(1)))
    sizes = [len(inputs) for inputs, _ in seen]
    shown = np.concatenate([inputs[:, 0] for inputs, _ in seen])
    assert len(seen) == n_batches(n, batch_size) >= 1
    assert len(set(shown)) == len(shown) >= n - 1
    assert max(sizes) <= batch_size
    assert batch_size == 1 or n == 1 or min(sizes) > 1


def test_fitting_to_a_model_casts_without_loss_or_refuses() -> None:
    data = numbered([0, 1, 2])
    assert data.for_model(input_shape=(1,), input_dtype="int64", n_outputs=3).inputs.dtype == np.int64
    values = data.for_model(input_shape=(1,), target_dtype="float32", target_shape=(1,))
    assert (values.targets.shape, values.targets.dtype) == ((3, 1), np.float32)
    with pytest.raises(DataError, match="class 2 is outside the model's 0 to 1"):
        data.for_model(input_shape=(1,), n_outputs=2)
    with pytest.raises(DataError, match="have fractions"):
        Dataset(inputs=np.full((2, 1), 0.5)).for_model(input_shape=(1,), input_dtype="int64")
    with pytest.raises(DataError, match="the model takes"):
        data.for_model(input_shape=(2,))
