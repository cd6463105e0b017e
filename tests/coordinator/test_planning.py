from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.agent.admission import refusal
from reft_edge.agent.reference_step import reference_bundle
from reft_edge.agent.settings import Limits
from reft_edge.bundle.manifest import BlobRef, Cost, Work
from reft_edge.coordinator.planning import DEFAULT_RATIOS, Assignment, merge_tiers, plan
from reft_edge.coordinator.policies import DEADLINE_SHARE, Ladder
from reft_edge.coordinator.prediction import (
    FIRST_LIMITS,
    Correction,
    Device,
    Option,
    Workload,
    correct,
    predict,
    unfit,
)
from reft_edge.coordinator.records import Prediction
from reft_edge.data.description import DataDescription
from reft_edge.errors import ConfigError, ModelError
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.messages import Measured, Task, TrainingPlan, WeightsRef

MIB = 2**20
WORKLOAD = Workload(local_epochs=2, batch_size=32, deadline_s=600.0)


def price(ratio: float) -> Option:
    """A net of 4 million parameters and 100 million multiply-accumulates, pruned."""
    kept = (1 - ratio) ** 2
    parameters = int(4_000_000 * kept)
    return Option(
        ratio=ratio,
        cost=Cost(
            parameters=parameters,
            forward_macs=int(1e8 * kept),
            step_flops_per_sample=int(6e8 * kept),
            memory_fixed_bytes=20 * parameters,
            memory_per_sample_bytes=int(2e6 * (1 - ratio)),
        ),
        graph_bytes=20_000,
        weight_bytes=4 * parameters,
        down_bytes=20_000 + 2 * parameters,
        delta_bytes=parameters,
        up_bytes=parameters,
        sample_bytes=4 * 3 * 32 * 32,
    )


def quantity(value: float) -> Quantity:
    return Quantity(value=value, basis="specified")


def profile(flops_per_s: float, memory_mib: float, link: float | None = None) -> DeviceProfile:
    return DeviceProfile(
        name="board",
        cores=quantity(4),
        clock_hz=quantity(1e9),
        flops_per_cycle=quantity(8),
        training_flops_per_s=quantity(flops_per_s),
        memory_total_bytes=quantity(8 * 2**30),
        memory_available_bytes=quantity(memory_mib * MIB),
        link_down_bytes_per_s=None if link is None else quantity(link),
        link_up_bytes_per_s=None if link is None else quantity(link),
    )


def device(
    flops_per_s: float = 5e9, memory_mib: float = 4000, samples: int = 1000, name: str = "d", **correction: float
) -> Device:
    return Device(
        device=name,
        profile=profile(flops_per_s, memory_mib),
        training_samples=samples,
        correction=Correction(**correction),
    )


def ladder() -> Ladder:
    return Ladder(DEFAULT_RATIOS, price)


def ratio(assignment: Assignment) -> float:
    """2 for a device that gets nothing: smaller than any variant."""
    return 2.0 if assignment.option is None else assignment.option.ratio


def plan_one(one: Device, policy: str = "deadline", workload: Workload = WORKLOAD) -> Assignment:
    return plan([one], workload=workload, ladder=ladder(), policy=policy)[0]


DEVICES = st.builds(
    device,
    flops_per_s=st.floats(1e8, 1e12),
    memory_mib=st.floats(60, 4000),
    samples=st.integers(0, 20_000),
    time_factor=st.floats(0.5, 4),
    memory_factor=st.floats(0.8, 2),
)
FLEETS = st.lists(DEVICES, min_size=1, max_size=12).map(
    lambda devices: [msgspec.structs.replace(one, device=f"d{i}") for i, one in enumerate(devices)]
)


@pytest.mark.parametrize("policy", ["deadline", "reft"])
@given(devices=FLEETS, max_variants=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_assignment_fits_and_tiers_are_few(policy: str, devices: list[Device], max_variants: int) -> None:
    assignments = plan(devices, workload=WORKLOAD, ladder=ladder(), policy=policy, max_variants=max_variants)
    assert [one.device for one in assignments] == [one.device for one in devices]
    assert len({ratio(one) for one in assignments if one.option}) <= max_variants
    alone = plan(devices, workload=WORKLOAD, ladder=ladder(), policy=policy, max_variants=16)
    for one, own, assigned in zip(devices, alone, assignments, strict=True):
        assert assigned.reason
        assert ratio(assigned) >= ratio(own), "sharing never makes a variant larger"
        assert (assigned.option is None) == (own.option is None)
        if assigned.option is None or assigned.prediction is None:
            continue
        assert assigned.prediction == predict(one, assigned.option, WORKLOAD)
        assert assigned.prediction.peak_memory_bytes <= one.profile.planning_memory_bytes
        if policy == "deadline":
            assert assigned.prediction.round_s <= DEADLINE_SHARE * WORKLOAD.deadline_s
    again = plan(devices, workload=WORKLOAD, ladder=ladder(), policy=policy, max_variants=max_variants)
    assert again == assignments


@given(one=DEVICES)
@settings(max_examples=60, deadline=None)
def test_deadline_takes_the_largest_that_will_do(one: Device) -> None:
    """Bisection against trying every rung."""
    for rung, step in enumerate(DEFAULT_RATIOS):
        expected = predict(one, price(step), WORKLOAD)
        in_time = expected.round_s <= DEADLINE_SHARE * WORKLOAD.deadline_s
        if one.training_samples and in_time and expected.peak_memory_bytes <= one.profile.planning_memory_bytes:
            assert ratio(plan_one(one)) == DEFAULT_RATIOS[rung]
            return
    assert plan_one(one).option is None


@given(
    flops=st.floats(1e8, 1e11),
    memory=st.floats(80, 2000),
    faster=st.floats(1, 50),
    policy=st.sampled_from(["deadline", "reft"]),
)
@settings(max_examples=60, deadline=None)
def test_more_flops_memory_or_time_never_give_a_smaller_variant(
    flops: float, memory: float, faster: float, policy: str
) -> None:
    reference = device(1e12, name="fastest")

    def given_to(one: Device, workload: Workload = WORKLOAD) -> float:
        return ratio(plan([one, reference], workload=workload, ladder=ladder(), policy=policy)[0])

    base = given_to(device(flops, memory))
    assert given_to(device(flops * min(faster, 1e12 / flops), memory)) <= base
    assert given_to(device(flops, memory * faster)) <= base
    longer = msgspec.structs.replace(WORKLOAD, deadline_s=WORKLOAD.deadline_s * faster)
    assert given_to(device(flops, memory), longer) <= base


def test_reft_prunes_in_proportion_to_flops() -> None:
    fleet = [device(speed, name=str(speed)) for speed in (8e9, 4e9, 2e9, 1e8)]
    assigned = plan(fleet, workload=WORKLOAD, ladder=ladder(), policy="reft")
    assert [ratio(one) for one in assigned] == [0.0, 0.5, 0.75, 15 / 16]
    assert "25% of the fastest" in assigned[2].reason


def test_what_fits_nowhere_is_told_with_numbers() -> None:
    assert "MiB of memory at ratio 0.938 but has 70 MiB" in plan_one(device(memory_mib=70)).reason
    assert "s at ratio 0.938, with a deadline of 600 s" in plan_one(device(1e6)).reason
    assert plan_one(device(samples=0)).reason == "has no training samples"
    for policy in ("deadline", "reft"):
        assert plan_one(device(memory_mib=70), policy).option is None
    small_disk = msgspec.structs.replace(profile(5e9, 4000), disk_free_bytes=quantity(1000))
    one = msgspec.structs.replace(device(), profile=small_disk)
    assert "of disk" in plan_one(one).reason


@given(
    memory=st.floats(150, 4000), failed=st.sampled_from(DEFAULT_RATIOS), policy=st.sampled_from(["deadline", "reft"])
)
@settings(max_examples=40, deadline=None)
def test_after_running_out_of_memory_a_device_gets_a_strictly_smaller_variant(
    memory: float, failed: float, policy: str
) -> None:
    assigned = plan_one(device(1e11, memory, failed_ratio=failed), policy)
    assert ratio(assigned) > failed
    assert "ran out of memory" in assigned.reason or "needs" in assigned.reason


def test_a_model_that_cannot_be_pruned_is_trained_whole_or_not_at_all() -> None:
    def stiff(step: float) -> Option:
        if step > 0:
            raise ModelError("no channel can go")
        return price(step)

    fleet = [device(1e11, name="strong"), device(1e11, 100, name="weak")]
    strong, weak = plan(fleet, workload=WORKLOAD, ladder=Ladder(DEFAULT_RATIOS, stiff))
    assert (ratio(strong), weak.option) == (0.0, None)
    assert weak.reason.startswith("needs ")
    assert weak.reason.endswith("has 100 MiB; no channel can go")

    def broken(step: float) -> Option:
        raise ModelError(f"cannot be compiled at {step}")

    with pytest.raises(ModelError, match="at 0"):
        plan(fleet, workload=WORKLOAD, ladder=Ladder(DEFAULT_RATIOS, broken))


def test_only_rungs_that_are_needed_are_priced() -> None:
    priced: list[float] = []

    def counting(step: float) -> Option:
        priced.append(step)
        return price(step)

    devices = [device(speed, name=str(speed)) for speed in (1e9, 1.1e9, 1.2e9)]
    plan(devices, workload=WORKLOAD, ladder=Ladder(DEFAULT_RATIOS, counting))
    assert len(priced) == len(set(priced)) <= 6


@given(
    n_devices=st.dictionaries(st.integers(0, 9), st.integers(1, 9), min_size=1),
    max_variants=st.integers(1, 4),
)
def test_tiers_are_the_cheapest_of_all_ways_to_merge(n_devices: dict[int, int], max_variants: int) -> None:
    from itertools import combinations

    parameters = {rung: (10 - rung) ** 2 for rung in n_devices}

    def lost(tier: dict[int, int]) -> int:
        return sum(n * (parameters[rung] - parameters[tier[rung]]) for rung, n in n_devices.items())

    tier = merge_tiers(n_devices, parameters, max_variants)
    assert tier.keys() == n_devices.keys()
    assert all(merged >= rung for rung, merged in tier.items())
    assert len(set(tier.values())) <= max_variants
    rungs = sorted(n_devices)
    every = [
        {rung: min(last for last in chosen if last >= rung) for rung in rungs}
        for size in range(1, max_variants + 1)
        for chosen in combinations(rungs, min(size, len(rungs)))
        if chosen[-1] == rungs[-1]
    ]
    assert lost(tier) == min(map(lost, every))


def test_prediction_adds_up() -> None:
    one = msgspec.structs.replace(device(6e9, samples=100), profile=profile(6e9, 4000, link=1e6), holdout_samples=50)
    expected = predict(one, price(0.0), WORKLOAD)
    assert expected.steps == 8  # three full batches and the rest, twice
    assert expected.training_s == pytest.approx(2 * 100 * 6e8 / 6e9)
    assert expected.step_s == pytest.approx(32 * 6e8 / 6e9)
    assert expected.evaluation_s == pytest.approx(50 * 2e8 / 6e9)
    assert expected.start_s > expected.evaluation_s, "the first evaluation comes before the first step"
    assert (expected.download_s, expected.upload_s) == (pytest.approx(8.02), pytest.approx(4.0))
    parts = ("download_s", "start_s", "training_s", "evaluation_s", "upload_s")
    assert expected.round_s == pytest.approx(sum(getattr(expected, part) for part in parts))
    slower = msgspec.structs.replace(one, correction=Correction(time_factor=3.0, transfer_factor=2.0))
    corrected = predict(slower, price(0.0), WORKLOAD)
    assert corrected.training_s == pytest.approx(3 * expected.training_s)
    assert corrected.download_s == pytest.approx(2 * expected.download_s)
    assert corrected.uncorrected_training_s == expected.training_s


def with_work(option: Option) -> Option:
    """The same variant, its work counted: mostly passes over memory, as in small models."""
    work = Work(
        product_flops_fixed=0,
        product_flops_per_sample=option.cost.step_flops_per_sample,
        moved_bytes_fixed=4 * option.weight_bytes,
        moved_bytes_per_sample=10**8,
        calls=500,
    )
    return msgspec.structs.replace(option, cost=msgspec.structs.replace(option.cost, step_work=work, forward_work=work))


def paced(one: Device, flops_per_s: float) -> Device:
    return msgspec.structs.replace(
        one, profile=msgspec.structs.replace(one.profile, granted_flops_per_s=quantity(flops_per_s))
    )


def test_without_measured_rates_the_reference_step_takes_what_the_one_figure_says() -> None:
    from reft_edge.profiling.reference import reference_step

    reference = reference_step()
    for one in (profile(5e9, 4000), msgspec.structs.replace(profile(5e9, 4000), training_flops_per_s=None)):
        assert reference.seconds(one.speed) == pytest.approx(reference.flops / one.planning_flops_per_s)


def test_a_small_variant_does_not_get_as_much_faster_as_it_has_fewer_operations() -> None:
    whole, small = (predict(device(), with_work(price(ratio)), WORKLOAD).training_s for ratio in (0.0, 0.75))
    assert whole / small < 0.5 * price(0.0).cost.step_flops_per_sample / price(0.75).cost.step_flops_per_sample


@given(granted=st.floats(1e6, 1e12), factor=st.floats(0.4, 2.5))
def test_pacing_bounds_a_step_from_below_and_is_not_taken_for_slowness(granted: float, factor: float) -> None:
    free, option = device(), with_work(price(0.5))
    one = paced(free, granted)
    expected = predict(one, option, WORKLOAD)
    pauses = WORKLOAD.local_epochs * free.training_samples * option.cost.step_flops_per_sample / granted
    assert expected.paced_training_s == pytest.approx(pauses)
    assert expected.training_s >= max(pauses, predict(free, option, WORKLOAD).training_s) * (1 - 1e-9)
    real = predict(msgspec.structs.replace(one, correction=Correction(time_factor=factor)), option, WORKLOAD)
    correction = correct([(expected, measured(training_s=real.training_s))])
    again = predict(msgspec.structs.replace(one, correction=correction), option, WORKLOAD)
    assert again.training_s == pytest.approx(real.training_s, rel=0.06)


def measured(**values: float) -> Measured:
    usual = {"download_s": 0.0, "start_s": 0.0, "training_s": 0.0, "steps": 1, "peak_memory_bytes": 0}
    return Measured(**{**usual, **values})  # type: ignore[arg-type]


@given(factor=st.floats(0.1, 20), outlier=st.floats(0.01, 100), at=st.integers(0, 2))
def test_corrections_follow_what_was_measured_but_not_one_bad_round(factor: float, outlier: float, at: int) -> None:
    expected = predict(device(), price(0.5), WORKLOAD)
    usual = measured(training_s=factor * expected.training_s, start_s=factor * expected.start_s)
    bad = measured(training_s=outlier * expected.training_s, start_s=outlier * expected.start_s)
    rounds = [usual, usual]
    rounds.insert(at, bad)
    correction = correct([(expected, one) for one in rounds])
    assert correction.time_factor == pytest.approx(factor)
    assert correction.start_factor == pytest.approx(factor)
    assert correction.transfer_factor == correction.memory_factor == 1.0
    corrected = predict(device(time_factor=correction.time_factor), price(0.5), WORKLOAD)
    # The second prediction is corrected already; its uncorrected part gives the same factor again.
    assert correct([(corrected, usual)] * 2).time_factor == pytest.approx(factor)


@given(outlier=st.floats(0.01, 100))
def test_a_single_round_is_believed_within_bounds_and_a_good_one_overrules_it(outlier: float) -> None:
    expected = predict(device(), price(0.5), WORKLOAD)
    bad, good = (measured(training_s=share * expected.training_s) for share in (outlier, 1.0))
    low, high = FIRST_LIMITS
    assert correct([(expected, bad)]).time_factor == pytest.approx(min(max(outlier, low), high))
    assert correct([(expected, bad), (expected, good)]).time_factor == pytest.approx(1.0)


def test_memory_is_corrected_by_the_largest_peak_with_a_margin() -> None:
    expected = predict(device(), price(0.5), WORKLOAD)
    model = expected.uncorrected_peak_memory_bytes - expected.base_memory_bytes
    peaks = [measured(peak_memory_bytes=int(expected.base_memory_bytes + share * model)) for share in (0.6, 0.9, 0.7)]
    assert correct([(expected, peak) for peak in peaks]).memory_factor == pytest.approx(0.99, rel=1e-3)
    assert correct([]) == Correction()
    assert correct([], failed_ratios=[0.0, 0.25]).failed_ratio == 0.25
    assert correct([(Prediction(), measured(training_s=3.0, peak_memory_bytes=5))]) == Correction()


def test_senseless_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="deadline, reft"):
        plan([device()], workload=WORKLOAD, ladder=ladder(), policy="fair")
    with pytest.raises(ConfigError, match="max_variants"):
        plan([device()], workload=WORKLOAD, ladder=ladder(), max_variants=0)
    for ratios in ((), (1.0,)):
        with pytest.raises(ConfigError, match="ratios"):
            Ladder(ratios, price)


def test_devices_share_the_variant_of_the_slower_one() -> None:
    devices = [device(speed, name=str(speed)) for speed in (5e8, 7e8, 9e8, 3e9)]
    apart = plan(devices, workload=WORKLOAD, ladder=ladder(), max_variants=16)
    together = plan(devices, workload=WORKLOAD, ladder=ladder(), max_variants=2)
    assert max(Counter(map(ratio, apart)).values()) < 3
    assert Counter(map(ratio, together)) == {ratio(apart[0]): 3, ratio(apart[3]): 1}
    assert "to share a variant" in together[2].reason


@given(
    memory=st.floats(60, 600),
    samples=st.integers(2, 20_000),
    batch_size=st.integers(1, 128),
    peak=st.floats(0.01, 10),
    rounds=st.integers(0, 2),
)
@settings(deadline=None)
def test_what_a_planner_assigns_the_device_does_not_refuse(
    memory: float, samples: int, batch_size: int, peak: float, rounds: int
) -> None:
    """Whatever earlier rounds made the planner believe: both have the formula from one place."""
    manifest = reference_bundle().manifest
    workload = Workload(local_epochs=1, batch_size=batch_size, deadline_s=1e9)
    option = Option.of(manifest, ratio=0.0, workload=workload)
    one = device(1e9, memory, samples)
    expected = predict(one, option, workload)
    model = expected.uncorrected_peak_memory_bytes - expected.base_memory_bytes
    found = measured(peak_memory_bytes=int(expected.base_memory_bytes + peak * model))
    one = msgspec.structs.replace(one, correction=correct([(expected, found)] * rounds))
    if unfit(one, option, predict(one, option, workload)):
        return
    ref = BlobRef(sha256="0" * 64, size_bytes=1)
    plan = TrainingPlan(local_epochs=1, batch_size=batch_size, learning_rate=0.1, seed=0)
    task = Task(task="t", round=1, run="r", bundle=ref, weights=WeightsRef(blob=ref), plan=plan, deadline=0)
    data = DataDescription(training_samples=samples, holdout_samples=0, n_classes=10, input_shape=(3, 32, 32))
    assert refusal(manifest, task, limits=Limits(), profile=one.profile, data=data) is None
