"""What hostile devices send, and that the recommended defence withstands them where the mean does not."""

from __future__ import annotations

import numpy as np
import pytest

from reft_edge.compile.channels import ChannelMap
from reft_edge.coordinator.aggregation_settings import AggregationSettings
from reft_edge.coordinator.distillation_settings import DistillationSettings
from reft_edge.simulation.attacks.attacks import (
    LITTLE,
    UPDATE_ATTACKS,
    HonestUpdate,
    Scene,
    flipped_labels,
)
from reft_edge.simulation.attacks.trial import Defence, Ground, TrialSettings, run_trial


def scene(n_honest=5):
    rng = np.random.default_rng(0)
    whole = ChannelMap.identity({"w": np.zeros((4, 3)), "n": np.zeros(())})
    half = ChannelMap({"w": np.arange(6).reshape(2, 3), "n": np.zeros((), np.int64)}, {"w": (4, 3), "n": ()})

    def delta(channels):
        return {
            "w": rng.normal(size=channels.variant_shapes["w"]).astype(np.float32),
            "n": np.array(7, np.int64),
        }

    honest = [HonestUpdate(channels=c, delta=delta(c)) for c in [whole, half] * n_honest]
    return Scene(channels=half, delta=delta(half), honest=honest, parameters={"w"}, rng=np.random.default_rng(1))


@pytest.mark.parametrize("attack", UPDATE_ATTACKS)
def test_an_attack_looks_like_an_update_and_leaves_counters_alone(attack):
    before = scene()
    sent = UPDATE_ATTACKS[attack](before)
    for name, values in before.delta.items():
        assert (sent[name].shape, sent[name].dtype) == (values.shape, values.dtype)
    assert sent["n"] == 7
    assert not np.array_equal(sent["w"], before.delta["w"])


def test_what_the_attacks_send():
    before = scene()
    np.testing.assert_allclose(UPDATE_ATTACKS["sign flipped"](before)["w"], -before.delta["w"])
    np.testing.assert_allclose(UPDATE_ATTACKS["scaled x10"](before)["w"], 10 * before.delta["w"], rtol=1e-6)
    held = np.array([update.delta["w"][:2] for update in before.honest])
    expected = held.mean(0) - LITTLE * held.std(0)
    np.testing.assert_allclose(UPDATE_ATTACKS["a little"](before)["w"], expected, rtol=1e-5)
    np.testing.assert_array_equal(flipped_labels(np.array([0, 3, 9]), 10), [9, 6, 0])


@pytest.mark.slow
def test_two_hostile_of_ten_break_the_mean_and_not_the_recommended_defence(tmp_path):
    """A cut of scripts/benchmarks/attacks: real training, real blobs, one seed, two attacks."""
    ground = Ground(TrialSettings(rounds=3, ratios=(0.0,) * 5 + (0.5,) * 5), seed=0, directory=tmp_path)
    assert len(ground.hostile) == 2
    robust = Defence(
        aggregation=AggregationSettings(rule="monna"), distillation=DistillationSettings(weights="agreement")
    )
    clean = run_trial(ground, Defence(), "clean")
    assert clean.accuracy[-1] > 0.9
    assert not any(clean.rejected)
    accuracy = {attack: run_trial(ground, robust, attack).accuracy[-1] for attack in ("flipped x3.5", "labels flipped")}
    assert min(accuracy.values()) > clean.accuracy[-1] - 0.03
    broken = run_trial(ground, Defence(), "flipped x3.5")
    assert broken.accuracy[-1] < clean.accuracy[-1] - 0.05
    assert broken.hostile == tuple(f"device-{index}" for index in sorted(ground.hostile))
