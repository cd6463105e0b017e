"""Measure this device: everything a plan needs to know, as a `DeviceProfile`.

Runs in the worker or in `reft-edge profile-device`, never in the daemon, because it loads numpy and onnxruntime. Takes
at most about 50 s, or 20 s when quick; less on a quiet machine, where figures settle early.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import reft_edge
from reft_edge.agent.base_memory import runtime_base_bytes
from reft_edge.agent.link_probe import measure_link
from reft_edge.agent.reference_step import Workload, matrix_product, training_step
from reft_edge.profiling.load import NOTABLE_SHARE, Load, read_load
from reft_edge.profiling.memory import copy_bandwidth, disk_free_bytes, memory_room
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.profiling.sustained import Rate, Repetition, sustained_rate
from reft_edge.profiling.system import System, read_system, suggested_name
from reft_edge.profiling.thermal import Thermal, read_thermal
from reft_edge.wire.endpoint import BrokerSettings

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Effort:
    """How long each part may take."""

    name: str
    product: Repetition
    training: Repetition
    copy: Repetition
    link_s: float


_QUICK = _Effort(
    name="quick",
    product=Repetition(min_s=1.5, max_s=3),
    training=Repetition(min_s=4, max_s=8),
    copy=Repetition(min_s=1, max_s=2),
    link_s=1.5,
)
_FULL = _Effort(
    name="full",
    product=Repetition(min_s=4, max_s=8),
    training=Repetition(min_s=12, max_s=25),
    copy=Repetition(min_s=2, max_s=4),
    link_s=4.0,
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A profile, and what a person should know before relying on it."""

    profile: DeviceProfile
    warnings: tuple[str, ...]


def measure_profile(
    *,
    quick: bool = False,
    threads: int | None = None,
    disk_path: Path,
    name: str | None = None,
    broker: BrokerSettings | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """The profile that `measure` makes, without its warnings."""
    return measure(
        quick=quick, threads=threads, disk_path=disk_path, name=name, broker=broker, progress=progress
    ).profile


def measure(
    *,
    quick: bool = False,
    threads: int | None = None,
    disk_path: Path,
    name: str | None = None,
    broker: BrokerSettings | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure this device.

    `threads`: how many compute; one for each core that this process may use unless given. `disk_path`: where the agent
    keeps its files. `name`: of the profile; the board's name unless given. `progress` gets a line before each part.
    Raises `BrokerError` when `broker` is given and cannot be measured.
    """
    tell = progress or (lambda _line: None)
    effort = _QUICK if quick else _FULL
    system = read_system()
    room = memory_room()
    n_threads = threads or system.threads
    thermal_before, load_before = read_thermal(), read_load()
    # The link comes first: a wrong address should not cost half a minute.
    link = None
    if broker is not None:
        tell(f"link to broker {broker.address}")
        link = measure_link(broker, budget_s=effort.link_s)
    tell("memory of an empty worker")
    base = runtime_base_bytes()
    tell("memory bandwidth")
    copy = copy_bandwidth(threads=n_threads, available_bytes=room.available_bytes, repetition=effort.copy)
    product = matrix_product(threads=n_threads)
    tell(product.description)
    product_rate = sustained_rate(product.run, work=product.flops, repetition=effort.product)
    # Training comes last, on a device that is warm by now.
    step = training_step(threads=n_threads)
    tell(step.description)
    step_rate = sustained_rate(step.run, work=step.flops, repetition=effort.training)
    thermal = read_thermal().since(thermal_before)
    others = _others_share(load_before)
    # Slower towards the end: the board throttles, and will when it trains; unless somebody else computes now.
    throttles = thermal.throttled or (step_rate.slowed and others <= NOTABLE_SHARE)
    training_per_s = step_rate.late_per_s if throttles else step_rate.per_s

    note = _Source(effort=effort.name, threads=n_threads)
    profile = DeviceProfile(
        name=name or suggested_name(system),
        description=_description(system, effort, n_threads),
        architecture=system.machine,
        processor=system.processor,
        cores=note.measured(system.cores, system.cores_source),
        clock_hz=_clock(system, note),
        flops_per_cycle=Quantity(value=system.flops_per_cycle, basis="specified", source=system.flops_per_cycle_source),
        gemm_flops_per_s=note.rate(product_rate.per_s, product_rate, product),
        training_flops_per_s=note.rate(training_per_s, step_rate, step),
        memory_bandwidth_bytes_per_s=note.measured(copy.per_s, f"copy, {_quality(copy)}"),
        memory_total_bytes=note.measured(room.total_bytes, "/proc/meminfo and control groups"),
        memory_available_bytes=note.measured(room.available_bytes, room.bound_by),
        runtime_base_bytes=None if base is None else note.measured(base, "a fresh process that loaded the trainer"),
        disk_free_bytes=note.measured(disk_free_bytes(disk_path), "free for an ordinary user"),
        temperature_celsius=_temperature(thermal, note),
        throttled=thermal.throttled,
        link_down_bytes_per_s=None if link is None else note.measured(link.down_bytes_per_s, "payload from the broker"),
        link_up_bytes_per_s=None if link is None else note.measured(link.up_bytes_per_s, "payload to the broker"),
        link_round_trip_s=None if link is None else note.measured(link.round_trip_s, "to the broker and back, median"),
    )
    return Measurement(
        profile=profile,
        warnings=(
            *_disturbances(thermal, others, {"the matrix product": product_rate, "training": step_rate}),
            *_doubts(system, profile),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Makes quantities that say how and when they were measured."""

    effort: str
    threads: int

    def measured(self, value: float, detail: str) -> Quantity:
        day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        how = f"measured {day} by reft-edge profile-device {reft_edge.__version__}, {self.effort}: {detail}"
        return Quantity(value=value, basis="measured", source=how)

    def rate(self, value: float, rate: Rate, workload: Workload) -> Quantity:
        return self.measured(value, f"{workload.description}, {self.threads} threads, {_quality(rate)}")


def _quality(rate: Rate) -> str:
    return f"best quarter of {rate.n_batches} batches within {rate.spread:.1%}"


def _clock(system: System, note: _Source) -> Quantity:
    if system.clock_source.startswith("assumed"):
        return Quantity(value=system.clock_hz, basis="specified", source=system.clock_source)
    return note.measured(system.clock_hz, system.clock_source)


def _temperature(thermal: Thermal, note: _Source) -> Quantity | None:
    celsius = thermal.temperature_celsius
    # Frost is possible on a mast; a quantity cannot be negative, and below zero nothing throttles.
    return None if celsius is None else note.measured(max(0.0, celsius), "hottest processor sensor, after training")


def _description(system: System, effort: _Effort, threads: int) -> str:
    board = f"{system.board}, " if system.board else ""
    return f"{board}{system.processor}; {effort.name} measurement with {threads} threads"


def _others_share(before: Load | None) -> float:
    after = read_load()
    return after.others_since(before) if before is not None and after is not None else 0.0


def _disturbances(thermal: Thermal, others: float, rates: dict[str, Rate]) -> Iterator[str]:
    """What made the figures lower or less certain than they might be."""
    if thermal.throttled:
        yield "the board throttles (too hot, or its power supply too weak): cool it, or count on these figures"
    if others > NOTABLE_SHARE:
        yield f"others took {others:.0%} of the processor meanwhile: figures may be low; measure an idle device"
    for what, rate in rates.items():
        if rate.slowed:
            speeds = f"from {rate.per_s / 1e9:.3g} to {rate.late_per_s / 1e9:.3g} GFLOP/s"
            yield f"{what} slowed down while it was measured, {speeds}: too hot, or disturbed"
        if not rate.stable:
            yield f"{what} did not settle: its best batches differ by {rate.spread:.0%}; measure again"


def _doubts(system: System, profile: DeviceProfile) -> Iterator[str]:
    """What this system did not tell, or told wrong."""
    if system.clock_source.startswith("assumed"):
        yield "this system does not tell its clock: the theoretical figure rests on 1 GHz"
    product = profile.gemm_flops_per_s
    if product is not None and product.value > profile.theoretical_flops_per_s:
        yield (
            f"the matrix product beats the theoretical figure: this system runs at a higher clock than the "
            f"{system.clock_hz / 1e9:.2f} GHz that it tells (turbo, or a virtual machine)"
        )
    if profile.runtime_base_bytes is None:
        yield "an empty worker could not be started to measure its memory; the profile lacks it"
