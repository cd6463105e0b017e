"""What devices say about themselves: nothing that they can say breaks a plan."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.coordinator.fleet import MAX_SAMPLES, unfit_reason
from reft_edge.coordinator.planning import DEFAULT_RATIOS, plan
from reft_edge.coordinator.policies import Ladder
from reft_edge.coordinator.prediction import CLOCK_SLACK_S, Device, Workload, believable, correct
from reft_edge.profiling.profile import LARGEST_VALUE, SMALLEST_VALUE, DeviceProfile
from reft_edge.wire.messages import Measured, ProfileAnnouncement
from tests.coordinator.test_planning import price, quantity

WORKLOAD = Workload(local_epochs=2, batch_size=32, deadline_s=600.0)

absurd_st = st.one_of(
    st.sampled_from([0.0, SMALLEST_VALUE, 1.0, 1e9, LARGEST_VALUE]),
    st.floats(SMALLEST_VALUE, LARGEST_VALUE),
    st.floats(1e6, 1e12),
).map(quantity)
positive_st = absurd_st.filter(lambda one: one.value > 0)
unknown_st = st.none() | absurd_st
profile_st = st.builds(
    DeviceProfile,
    name=st.just("x"),
    cores=positive_st,
    clock_hz=positive_st,
    flops_per_cycle=positive_st,
    training_flops_per_s=unknown_st,
    memory_total_bytes=positive_st,
    memory_available_bytes=unknown_st,
    runtime_base_bytes=unknown_st,
    worker_start_s=unknown_st,
    disk_free_bytes=unknown_st,
    link_down_bytes_per_s=unknown_st,
    link_up_bytes_per_s=unknown_st,
    link_round_trip_s=unknown_st,
)
samples_st = st.integers(0, 2**53)
measured_st = st.builds(
    Measured,
    download_s=st.floats(0, 1.7e308),
    start_s=st.floats(0, 1.7e308),
    training_s=st.floats(0, 1.7e308),
    steps=samples_st,
    peak_memory_bytes=samples_st,
)


def unfit(announcement):
    return unfit_reason(announcement, input_shape=(3,), n_outputs=2, classification=True)


@pytest.mark.parametrize("policy", ["deadline", "reft"])
@settings(max_examples=200, deadline=None)
@given(profile=profile_st, samples=samples_st, holdout=samples_st, measured=measured_st)
def test_whatever_a_device_announces_the_plan_is_made_and_can_be_stored(policy, profile, samples, holdout, measured):
    announcement = ProfileAnnouncement(profile=profile, training_samples=samples, holdout_samples=holdout)
    if unfit(announcement):
        return
    device = Device(device="d", profile=profile, training_samples=samples, holdout_samples=holdout)
    for _ in range(2):  # the second time corrected by what the device says it measured
        (assignment,) = plan([device], workload=WORKLOAD, ladder=Ladder(DEFAULT_RATIOS, price), policy=policy)
        if assignment.prediction is None:
            return
        values = msgspec.structs.asdict(assignment.prediction)
        assert all(math.isfinite(value) for value in values.values())
        correction = correct([(assignment.prediction, believable(measured, elapsed_s=600))])
        device = msgspec.structs.replace(device, correction=correction)


def board(**values):
    usual = {"cores": 4, "clock_hz": 1e9, "flops_per_cycle": 8, "memory_total_bytes": 2**30}
    return DeviceProfile(name="board", **{name: quantity(value) for name, value in (usual | values).items()})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"training_flops_per_s": 1e20}, "it announces 1e+20 FLOP/s"),
        ({"cores": 1e-9, "clock_hz": 1e-9}, "it announces 8e-19 FLOP/s"),
        ({"link_up_bytes_per_s": 1e-9}, "it announces link_up_bytes_per_s = 1e-09"),
        ({"link_round_trip_s": 1e9}, "it announces link_round_trip_s = 1e+09"),
    ],
)
def test_an_impossible_profile_is_left_out_with_its_reason(values, reason):
    announcement = ProfileAnnouncement(profile=board(**values), training_samples=5)
    assert unfit(announcement).startswith(reason)
    assert unfit(ProfileAnnouncement(profile=board(), training_samples=5)) == ""
    assert "samples" in unfit(ProfileAnnouncement(profile=board(), training_samples=MAX_SAMPLES + 1))


@pytest.mark.parametrize("said", [1e9, 1e300])
def test_nobody_measured_longer_than_the_round_lasted(said):
    absurd = Measured(download_s=1, start_s=1, training_s=said, steps=9, peak_memory_bytes=7)
    believed = believable(absurd, elapsed_s=100.0)
    assert (believed.download_s, believed.start_s, believed.training_s) == (0, 0, 0)
    assert (believed.steps, believed.peak_memory_bytes) == (9, 7)


@given(st.floats(0, 30), st.floats(0, 30), st.floats(0, 40))
def test_what_fits_into_the_round_is_believed(download, start, training):
    took = Measured(download_s=download, start_s=start, training_s=training, steps=1, peak_memory_bytes=1)
    assert believable(took, elapsed_s=100.0 - CLOCK_SLACK_S) == took
