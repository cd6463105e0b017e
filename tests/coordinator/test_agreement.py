"""Properties of teachers' weights by agreement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.bundle.manifest import CrossEntropy, MeanSquaredError
from reft_edge.coordinator.agreement import BETA, agreement_weights, divergences_of_classes, divergences_of_values
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.coordinator.ensemble import Teacher, ensemble_targets

AGREEMENT = DistillationSettings(weights="agreement", temperature=2.0)


def logits(n_teachers, seed=0, spread=0.3):
    """Teachers that say the same, but for noise: float32 (n_teachers, 40, 4)."""
    rng = np.random.default_rng(seed)
    truth = 4 * np.eye(4)[np.arange(40) % 4]
    return (truth + spread * rng.normal(size=(n_teachers, 40, 4))).astype(np.float32)


FLOOR = 1e-9
"""What every probability gets, so that none is 0."""


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def target(outputs, settings=AGREEMENT, loss=None, samples=None):
    teachers = [
        Teacher(name=f"t{k}", outputs=one, samples=1.0 if samples is None else samples[k])
        for k, one in enumerate(outputs)
    ]
    return ensemble_targets(teachers, settings=settings, loss=loss or CrossEntropy(), n_public=len(outputs[0]))


def slow_divergence(cohort, teacher):
    total = 0.0
    for r, p in zip(cohort, teacher, strict=True):
        total += sum(a * np.log(a / (b + FLOOR)) for a, b in zip(r, p, strict=True))
    return total / len(cohort)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), n_teachers=st.integers(1, 6))
def test_divergences_are_those_from_the_median_and_weights_fall_exponentially_with_them(seed, n_teachers):
    probabilities = softmax(logits(n_teachers, seed, 2.0).astype(np.float64))
    cohort = np.median(probabilities, axis=0) + FLOOR
    cohort /= cohort.sum(-1, keepdims=True)
    found = divergences_of_classes(list(probabilities))
    np.testing.assert_allclose(found, [slow_divergence(cohort, p) for p in probabilities], atol=1e-12)
    weights = agreement_weights(found)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights / weights[0], np.exp(-BETA * (found - found[0])), rtol=1e-6)


def test_teachers_that_say_the_same_count_alike_whatever_samples_they_claim():
    same = np.repeat(logits(1), 5, axis=0)
    np.testing.assert_allclose(target(same), target(same[:1]), rtol=1e-5)
    outputs = logits(5)
    np.testing.assert_array_equal(target(outputs), target(outputs, samples=[1e9, 1, 1, 1, 1]))
    np.testing.assert_allclose(target(outputs), target(outputs[::-1]), rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 5.0, 1e6, 1e37])
def test_a_minority_of_teachers_with_flipped_labels_does_not_decide(size):
    outputs = logits(10)
    lie = outputs.copy()
    lie[:3] = size * outputs[:3, :, ::-1]
    honest, fooled = target(outputs), target(lie)
    assert (fooled.argmax(-1) == honest.argmax(-1)).all()
    by_samples = target(lie, DistillationSettings(temperature=2.0))
    assert np.abs(fooled - honest).mean() < 0.5 * np.abs(by_samples - honest).mean()


def test_for_regression_it_is_the_distance_to_the_median_output():
    rng = np.random.default_rng(0)
    outputs = (rng.normal(size=(1, 30, 2)) + 0.1 * rng.normal(size=(7, 30, 2))).astype(np.float32)
    lie = outputs.copy()
    lie[:2] = 1e30
    fooled, honest = (target(one, loss=MeanSquaredError()) for one in (lie, outputs))
    assert np.abs(fooled - honest).max() < 0.2
    alike = divergences_of_values([outputs[0]] * 4)
    np.testing.assert_array_equal(agreement_weights(alike), np.full(4, 0.25))
    lonely = divergences_of_values([outputs[0]] * 4 + [outputs[1]])
    np.testing.assert_array_equal(agreement_weights(lonely), [0.25] * 4 + [0.0])
