"""Which model a device is offered, and who tries a version first."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.bundle.manifest import Cost
from reft_edge.bundle.memory import PREDICTION_FACTOR
from reft_edge.coordinator.deploying.choosing import (
    Candidate,
    Facts,
    choose,
    choose_canaries,
    model_of_variant,
    predicted_latency_s,
    predicted_memory_bytes,
)
from reft_edge.coordinator.records import ReleasedModel
from reft_edge.errors import ConfigError
from reft_edge.wire.deployment import BlobRef, ModelFile
from tests.coordinator.device import profile

MIB = 2**20


def candidate(name, *, mib, macs=None, score=None):
    blob = BlobRef(sha256="0" * 64, size_bytes=1)
    file = ModelFile(blob=blob, size_bytes=mib * MIB, precision="float32")
    cost = None
    if macs is not None:
        cost = Cost(
            parameters=1,
            forward_macs=macs,
            step_flops_per_sample=1,
            memory_fixed_bytes=0,
            memory_per_sample_bytes=0,
        )
    return Candidate(
        model=ReleasedModel(name=name, files=(file,), sha256s=("0" * 64,)), cost=cost, score=score, sample_bytes=0
    )


LADDER = [
    candidate("global", mib=40, macs=10**9, score=0.9),
    candidate("variant-0.5", mib=10, macs=10**8, score=0.85),
    candidate("variant-0.9", mib=1, macs=10**7, score=0.7),
]


def board(*, flops_per_s=1e9, mib=1024):
    return profile("board", flops_per_s=flops_per_s, memory_bytes=mib * MIB)


def choice(*, trained="", latency_s=None, forced="", known=True, **hardware):
    facts = Facts(device="d", profile=board(**hardware) if known else None, trained=trained)
    return choose(LADDER, facts, latency_s=latency_s, forced=forced)


def test_a_device_gets_what_it_trained_and_the_next_smaller_if_it_refuses_that():
    assert choice(trained="variant-0.5").model == "variant-0.5"
    assert choice(trained="variant-0.5").smaller == "variant-0.9"
    assert choice(trained="variant-0.9").smaller == ""
    assert choice(trained="variant-0.5").why == "what it trained"


def test_a_device_that_trained_nothing_gets_the_largest_that_fits_its_memory():
    assert choice().model == "global"
    need = predicted_memory_bytes(LADDER[0], board())
    assert choice(mib=(need - 1) / MIB).model == "variant-0.5"
    assert choice(mib=1).why == "the smallest; none should fit its memory"
    assert choice(known=False).model == "global"


def test_memory_is_that_of_predicting_where_it_was_counted():
    plain = candidate("global", mib=1, macs=1)
    without = predicted_memory_bytes(plain, board())

    def added(**counted):
        cost = msgspec.structs.replace(plain.cost, **counted)
        return predicted_memory_bytes(dataclasses.replace(plain, cost=cost), board()) - without

    assert added(memory_per_sample_bytes=8 * MIB) == 8 * MIB
    assert added(memory_per_sample_bytes=8 * MIB, prediction_bytes_per_sample=MIB) == PREDICTION_FACTOR * MIB


def test_with_a_goal_it_is_the_best_that_is_predicted_to_meet_it():
    latencies = [predicted_latency_s(one, board()) for one in LADDER]
    assert latencies == sorted(latencies, reverse=True)
    for goal, model in [(latencies[0], "global"), (latencies[1], "variant-0.5"), (latencies[2], "variant-0.9")]:
        assert choice(latency_s=goal, trained="variant-0.9").model == model
    assert choice(latency_s=latencies[2] / 2).why.startswith("the fastest; ")
    assert choice(latency_s=1e-9, known=False).why.endswith("its latency cannot be predicted")


def test_a_person_may_choose_for_all():
    assert choice(forced="variant-0.9", trained="global").model == "variant-0.9"
    with pytest.raises(ConfigError, match=r"no model 'variant-0\.4'; it has: global, variant-0\.5"):
        choice(forced="variant-0.4")


fleets = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.sampled_from(["x", "y", "z"]), max_size=30)


@given(models=fleets, share=st.floats(0, 1))
def test_canaries_are_some_but_not_more_than_asked_for_without_need(models, share):
    canaries = choose_canaries(models, share=share, version="v")
    assert canaries <= models.keys()
    assert bool(canaries) == bool(models)
    needed = max(1, min(len(set(models.values())), len(models) // 2))
    assert len(canaries) <= max(needed, share * len(models) + 1)
    assert len(canaries) >= min(len(models), share * len(models) - 1e-6)
    if len(canaries) >= len(set(models.values())):
        assert {models[device] for device in canaries} == set(models.values())
    assert choose_canaries(dict(reversed(models.items())), share=share, version="v") == canaries


def test_another_version_is_tried_by_others():
    models = {f"pi-{number}": "global" for number in range(20)}
    chosen = {choose_canaries(models, share=0.05, version=f"v{number}") for number in range(8)}
    assert len(chosen) > 3


def test_who_cannot_judge_a_version_tries_it_first_only_where_nobody_can():
    models = {f"pi-{number}": "global" for number in range(20)}
    unable = models.keys() - {"pi-3", "pi-7"}
    for number in range(8):
        assert choose_canaries(models, share=0.1, version=f"v{number}", unable=unable) == {"pi-3", "pi-7"}
    assert len(choose_canaries(models, share=0.1, version="v", unable=models)) == 2


def test_canaries_that_a_person_names_are_those_that_are_there():
    assert choose_canaries({"a": "x", "b": "x"}, share=1, named=("b", "c")) == {"b"}


def test_a_variant_is_exported_under_its_ratio():
    assert [model_of_variant(name) for name in ("0", "0.5", "0.875")] == ["global", "variant-0.5", "variant-0.875"]
