"""From readings to a profile: which figure counts, and what a person is warned of. Nothing is measured here."""

from __future__ import annotations

from typing import Any

import pytest

from reft_edge.agent.empty_worker import EmptyWorker
from reft_edge.agent.profiler import Readings, disturbances, doubts, to_profile
from reft_edge.profiling.memory import MemoryRoom
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.profiling.speed import TimedStep
from reft_edge.profiling.sustained import Rate
from reft_edge.profiling.system import System
from reft_edge.profiling.thermal import Thermal


def rate(giga: float, *, late: float | None = None, stable: bool = True) -> Rate:
    late_per_s = 1e9 * (giga if late is None else late)
    return Rate(per_s=1e9 * giga, spread=0.01, busy=0.0, late_per_s=late_per_s, n_batches=20, stable=stable)


def readings(**changes: Any) -> Readings:
    system = System(
        board="Raspberry Pi 4 Model B Rev 1.2",
        processor="4 x Cortex-A72",
        machine="aarch64",
        cores=4,
        cores_source="affinity",
        clock_hz=1.5e9,
        clock_source=changes.pop("clock_source", "cpufreq"),
        flops_per_cycle=8,
        flops_per_cycle_source="cpufp",
    )
    values: dict[str, Any] = {
        "system": system,
        "room": MemoryRoom(total_bytes=2**32, available_bytes=2**31, bound_by="control group"),
        "link": None,
        "worker": EmptyWorker(resident_bytes=50 * 2**20, start_s=0.5),
        "copy": rate(5),
        "product": rate(20),
        "product_of": "matrix product",
        "training": rate(8),
        "training_of": "training steps",
        "steps": (TimedStep(product_flops=1e9, moved_bytes=1e9, calls=400, seconds=0.3),),
        "thermal": Thermal(temperature_celsius=50.0, throttled=False),
        "others": 0.0,
    }
    return Readings(**{**values, **changes})


def profile_of(measured: Readings) -> DeviceProfile:
    return to_profile(measured, effort="quick", threads=None, name=None, disk_free=2**30)


def warnings_of(measured: Readings) -> list[str]:
    return [*disturbances(measured), *doubts(measured.system, profile_of(measured))]


def test_a_quiet_measurement_has_a_profile_with_sources_and_no_warning() -> None:
    profile = profile_of(readings())
    assert profile.name == "raspberry-pi-4-model-b"
    assert profile.planning_flops_per_s == 8e9
    assert profile.theoretical_flops_per_s == 48e9
    assert profile.training_flops_per_s is not None
    assert "quick" in profile.training_flops_per_s.source
    assert "4 threads" in profile.training_flops_per_s.source
    assert profile.link_up_bytes_per_s is None
    assert warnings_of(readings()) == []


@pytest.mark.parametrize(
    ("changes", "giga", "warnings"),
    [
        ({"training": rate(8, late=5)}, 5, ["slowed down"]),  # it throttles, and will when it trains
        ({"training": rate(8, late=5), "others": 0.4}, 8, ["others took 40%", "slowed down"]),
        ({"thermal": Thermal(temperature_celsius=85.0, throttled=True)}, 8, ["throttles"]),
        (
            {"thermal": Thermal(temperature_celsius=85.0, throttled=True), "training": rate(8, late=7.5)},
            7.5,
            ["thrott"],
        ),
        ({"training": rate(8, stable=False)}, 8, ["training did not settle"]),
        ({"product": rate(60)}, 8, ["beats the theoretical"]),
        ({"clock_source": "assumed: unknown"}, 8, ["does not tell its clock"]),
        ({"worker": None}, 8, ["empty worker"]),
    ],
)
def test_what_disturbs_is_told_and_the_right_figure_counts(
    changes: dict[str, Any], giga: float, warnings: list[str]
) -> None:
    measured = readings(**changes)
    assert profile_of(measured).planning_flops_per_s == giga * 1e9
    told = warnings_of(measured)
    assert len(told) == len(warnings)
    assert all(part in line for part, line in zip(warnings, told, strict=True))


def test_all_rates_are_as_slow_as_the_board_that_throttles() -> None:
    cool, hot = profile_of(readings()).step_rates, profile_of(readings(training=rate(8, late=4))).step_rates
    assert cool is not None
    assert hot is not None
    assert hot.product_flops_per_s.value == pytest.approx(cool.product_flops_per_s.value / 2, rel=1e-3)
    assert hot.moved_bytes_per_s.value == pytest.approx(cool.moved_bytes_per_s.value / 2, rel=1e-3)
    assert hot.call_s.value == pytest.approx(2 * cool.call_s.value, rel=1e-3)


def test_an_assumed_clock_is_not_called_measured_and_frost_is_zero() -> None:
    profile = profile_of(
        readings(clock_source="assumed: unknown", thermal=Thermal(temperature_celsius=-5.0, throttled=None))
    )
    assert profile.clock_hz.basis == "specified"
    assert profile.temperature_celsius is not None
    assert profile.temperature_celsius.value == 0
