"""Properties of views of the public inputs, and of teaching with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reft_edge.coordinator.augmentation import Views
from reft_edge.coordinator.distillation import distil, views_of
from reft_edge.coordinator.distillation_settings import AugmentationSettings, DistillationSettings
from reft_edge.coordinator.ensemble import Teacher
from reft_edge.errors import ConfigError, FederationError

PICTURES = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 6), np.uint8)
WINDOWS = np.random.default_rng(1).normal(size=(20, 4, 9)).astype(np.float32)


def moved(sample, steps, axis):
    """Slow and obvious: `sample` moved along `axis`, its edge repeated."""
    size = sample.shape[axis]
    return np.take(sample, [min(max(i - steps, 0), size - 1) for i in range(size)], axis=axis)


def possible(sample, options):
    """Every version that `options` allow."""
    mirrored = [sample, sample[..., ::-1]] if options.flip else [sample]
    steps = range(-options.shift, options.shift + 1)
    rows = steps if sample.ndim == 3 else [0]
    return {moved(moved(one, dy, -2), dx, -1).tobytes() for one in mirrored for dy in rows for dx in steps}


@settings(max_examples=15, deadline=None)
@given(flip=st.booleans(), shift=st.integers(0, 3), seed=st.integers(0, 99), pictures=st.booleans())
def test_every_sample_of_every_view_is_a_flip_and_a_shift_of_itself(flip, shift, seed, pictures):
    inputs = PICTURES if pictures else WINDOWS
    options = AugmentationSettings(flip=flip and pictures, shift=shift, views=3)
    views = Views(inputs=inputs, settings=options, seed=seed)
    assert views.view(0) is inputs
    for number in range(1, len(views)):
        view = views.view(number)
        assert (view.shape, view.dtype) == (inputs.shape, inputs.dtype)
        assert all(after.tobytes() in possible(before, options) for before, after in zip(inputs, view, strict=True))
        assert np.array_equal(view, views.view(number))  # made anew, the same


def test_views_differ_from_each_other_and_from_seed_to_seed():
    options = AugmentationSettings(flip=True, shift=2)
    one, other = (Views(inputs=PICTURES, settings=options, seed=seed) for seed in (1, 2))
    assert len({one.view(n).tobytes() for n in range(4)} | {other.view(n).tobytes() for n in range(4)}) == 7
    flipped = Views(inputs=PICTURES, settings=AugmentationSettings(flip=True), seed=0).view(1)
    share = np.mean([not np.array_equal(a, b) for a, b in zip(PICTURES, flipped, strict=True)])
    assert 0.2 < share < 0.8


def test_without_a_change_there_is_one_view():
    assert len(Views(inputs=PICTURES, settings=AugmentationSettings(views=9), seed=0)) == 1


@pytest.mark.parametrize(
    ("options", "shape", "reason"),
    [
        (AugmentationSettings(flip=True), (4, 9), "flip is for pictures"),
        (AugmentationSettings(flip=True), (12,), "flip is for pictures"),
        (AugmentationSettings(shift=1), (12,), "shift is for pictures and for windows"),
        (AugmentationSettings(shift=6), (3, 8, 6), "moves everything out"),
    ],
)
def test_changes_that_would_not_keep_the_meaning_are_refused_by_name(options, shape, reason):
    assert reason in options.unfit_reason(shape)
    with pytest.raises(ConfigError, match=r"\[distillation.augmentation\] .*" + reason):
        Views(inputs=np.zeros((2, *shape), np.float32), settings=options, seed=0)


def test_the_student_learns_each_view_with_what_the_teacher_says_about_that_view():
    """A teacher that looks at one corner pixel: with targets of another view, nothing could be learned of it."""

    def says(inputs):
        bright = (inputs[:, 0, 0, 0] > 127).astype(np.float32)
        return np.stack([9 * bright, 9 * (1 - bright)], axis=1)

    options = DistillationSettings(
        epochs=30, learning_rate=0.02, temperature=1.0, augmentation=AugmentationSettings(shift=3, views=5)
    )
    inputs = np.random.default_rng(2).integers(0, 256, (256, 1, 5, 5), np.uint8)
    views = views_of(inputs, options, 3)
    outputs = [says(views.view(number)) for number in range(len(views))]

    def learn(augmented):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(25, 16), nn.ReLU(), nn.Linear(16, 2))
        teacher = Teacher(name="corner", outputs=outputs[0], augmented=augmented, samples=1.0)
        return distil(student, [teacher], inputs, settings=options, seed=3).losses[-1]

    assert learn(tuple(outputs[1:])) < 0.5 * learn((outputs[0],) * 4)
    with pytest.raises(FederationError, match="has seen 1 of 5 views"):
        learn(())
