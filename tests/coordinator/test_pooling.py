"""Properties of joining teachers class by class."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.bundle.manifest import CrossEntropy
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.ensemble import Teacher, ensemble_targets
from reft_edge.coordinator.pooling import UNIFORM_SHARE, class_mix, pooled_scores, softmax

N_CLASSES = 4
TRUTH = np.arange(80) % N_CLASSES
"""Of the public inputs, which hold every class as often."""


def truth_seen_by(counts, *, seed=0, noise=0.3):
    """Logits of a teacher with these class counts (Bayes' rule): evidence for the truth, and its own prior."""
    evidence = 3.0 * np.eye(N_CLASSES)[TRUTH] + noise * np.random.default_rng(seed).normal(size=(80, N_CLASSES))
    shares = (np.array(counts) + 0.01) / (np.sum(counts) + 0.01 * N_CLASSES)
    return (evidence + np.log(shares)).astype(np.float32)


def equal(n):
    return np.full(n, 1 / n)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n_teachers=st.integers(1, 5))
def test_teachers_with_one_mix_are_a_weighted_logarithmic_pool(seed, n_teachers):
    """With equal mixes nothing is adjusted: the slow, obvious reference."""
    rng = np.random.default_rng(seed)
    one = rng.normal(size=(8, N_CLASSES))
    outputs = [one[rng.permutation(8)] for _ in range(n_teachers)]  # the same rows: the same mean prediction
    weights = rng.dirichlet(np.ones(n_teachers))
    mixed = [(1 - UNIFORM_SHARE) * softmax(z) + UNIFORM_SHARE / N_CLASSES for z in outputs]
    expected = sum(w * np.log(p) for w, p in zip(weights, mixed, strict=True))
    np.testing.assert_allclose(pooled_scores(outputs, weights), expected, atol=1e-9)


def test_a_teacher_s_mix_is_its_class_counts():
    counts = np.array([100, 40, 10, 250])
    mix = class_mix(truth_seen_by(counts).astype(np.float64))
    assert mix.sum() == pytest.approx(1)
    assert np.argsort(mix).tolist() == np.argsort(counts).tolist()


def test_a_class_that_only_one_of_five_has_seen_is_found_by_the_pool_and_lost_by_the_mean():
    many = [truth_seen_by([100, 100, 100, 0], seed=seed) for seed in range(4)]
    one = truth_seen_by([5, 5, 5, 100], seed=9)
    teachers = [Teacher(name=f"t{k}", outputs=z, samples=1.0) for k, z in enumerate([*many, one])]

    def found(pooling):
        options = DistillationSettings(pooling=pooling, temperature=1.0, weights="uniform")
        said = ensemble_targets(teachers, settings=options, loss=CrossEntropy(), n_public=80).argmax(1)
        return (said == TRUTH)[TRUTH == 3].mean(), (said == TRUTH)[TRUTH != 3].mean()

    assert found("classes") == (1.0, 1.0)
    assert found("mean")[0] < 0.5


def test_a_teacher_that_never_saw_a_class_hardly_moves_its_score():
    """The score of class 3 with a teacher that rules it out everywhere, and without."""
    knows = [truth_seen_by([50, 50, 50, 50], seed=seed) for seed in range(3)]
    never = truth_seen_by([50, 50, 50, 0], seed=7) - 30 * (np.arange(N_CLASSES) == 3).astype(np.float32)
    without = pooled_scores(knows, equal(3))[:, 3]
    with_it = pooled_scores([*knows, never], equal(4))[:, 3]
    by_mean = sum(np.log(softmax(z.astype(np.float64))) for z in [*knows, never])[:, 3] / 4
    assert np.abs(with_it - without).max() < 0.5
    assert np.abs(by_mean - without).max() > 5


def test_no_teacher_can_veto_a_class():
    honest = [truth_seen_by([50] * N_CLASSES, seed=seed) for seed in range(4)]
    liar = np.full((80, N_CLASSES), 0.0, np.float32)
    liar[np.arange(80), (TRUTH + 1) % N_CLASSES] = 1e30
    scores = pooled_scores([*honest, liar], equal(5))
    assert np.isfinite(scores).all()
    assert (scores.argmax(1) == TRUTH).all()


def test_order_of_teachers_and_constants_in_logits_do_not_matter():
    outputs = [truth_seen_by(counts, seed=k) for k, counts in enumerate(([9, 1, 5, 5], [1, 9, 1, 1], [4, 4, 0, 9]))]
    weights = np.array([0.5, 0.3, 0.2])
    scores = pooled_scores(outputs, weights)
    np.testing.assert_allclose(pooled_scores(outputs[::-1], weights[::-1]), scores, atol=1e-9)
    np.testing.assert_allclose(pooled_scores([z + 64 for z in outputs], weights), scores, atol=1e-4)
