"""Measure this device: everything a plan needs to know, as a `DeviceProfile`.

Runs in the worker or in `reft-edge profile-device`, never in the daemon, because it loads numpy and onnxruntime. Takes
at most about 50 s, or 20 s when quick; less on a quiet machine, where figures settle early.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import reft_edge
from reft_edge.agent.empty_worker import EmptyWorker, measure_empty_worker
from reft_edge.agent.link_probe import LinkSpeed, measure_link
from reft_edge.agent.reference_step import matrix_product, training_steps
from reft_edge.profiling.cgroups import cpu_quota
from reft_edge.profiling.load import NOTABLE_SHARE, read_load
from reft_edge.profiling.memory import MemoryRoom, copy_bandwidth, disk_free_bytes, memory_room
from reft_edge.profiling.profile import DeviceProfile, Quantity, StepRates, expected_speed
from reft_edge.profiling.speed import TimedStep, fit_speed
from reft_edge.profiling.sustained import Rate, Repetition, sustained_rate, sustained_rates
from reft_edge.profiling.system import System, read_system, suggested_name
from reft_edge.profiling.thermal import Thermal, read_thermal
from reft_edge.profiling.undisturbed import own_clock
from reft_edge.wire.endpoint import BrokerSettings

Tell: TypeAlias = Callable[[str], None]

_DIGITS = 5
_EMPTY_WORKER = "a fresh process that loaded the trainer"
"""Significant digits of a timed value: more than it is good for, few enough to read. Counts stay exact."""


@dataclass(frozen=True, kw_only=True)
class _Effort:
    """How long each part may take."""

    name: str
    product: Repetition
    training: Repetition
    copy: Repetition
    link_s: float

    def under_quota(self) -> _Effort:
        """The same where a control group interrupts us: batches of several of its periods, each as a whole."""

        def patient(limits: Repetition) -> Repetition:
            return replace(limits, batch_s=0.5, whole_batches=True)

        return replace(self, product=patient(self.product), training=patient(self.training), copy=patient(self.copy))


_QUICK = _Effort(
    name="quick",
    product=Repetition(min_s=1.2, max_s=2.5),
    training=Repetition(batch_s=0.1, min_s=4, max_s=8),
    copy=Repetition(min_s=0.8, max_s=1.5),
    link_s=1.5,
)
_FULL = _Effort(
    name="full",
    product=Repetition(min_s=4, max_s=8),
    training=Repetition(batch_s=0.1, min_s=12, max_s=25),
    copy=Repetition(min_s=2, max_s=4),
    link_s=4.0,
)


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What was read and timed, before it becomes a profile."""

    system: System
    room: MemoryRoom
    link: LinkSpeed | None
    worker: EmptyWorker | None
    copy: Rate
    product: Rate
    product_of: str
    training: Rate
    training_of: str
    steps: tuple[TimedStep, ...]
    """The reference step and others, at the pace that the first was measured at."""
    thermal: Thermal
    others: float
    """Share of the processor that others took while the rates were timed."""

    @property
    def training_per_s(self) -> float:
        """FLOP/s to plan with.

        Where training became slower towards the end, the board throttles and will when it trains, so the later figure
        counts; unless somebody else computes now, which is no property of the board.
        """
        throttles = self.thermal.throttled or (self.training.slowed and self.others <= NOTABLE_SHARE)
        return self.training.late_per_s if throttles else self.training.per_s


def measure_profile(
    *,
    quick: bool = False,
    threads: int | None = None,
    disk_path: Path,
    name: str | None = None,
    broker: BrokerSettings | None = None,
    progress: Tell | None = None,
    warn: Tell | None = None,
) -> DeviceProfile:
    """Measure this device.

    `threads`: how many compute; one for each core that this process may use unless given. `disk_path`: where the agent
    keeps its files. `name`: of the profile; the board's name unless given. `progress` gets a line before each part,
    `warn` a line for each reason to doubt the result.

    Raises `BrokerError` when `broker` is given and cannot be measured.
    """
    effort = _QUICK if quick else _FULL
    if cpu_quota() is not None:
        effort = effort.under_quota()
    readings = _read(effort, threads=threads, broker=broker, tell=progress or _silent)
    profile = to_profile(readings, effort=effort.name, threads=threads, name=name, disk_free=disk_free_bytes(disk_path))
    for line in (*disturbances(readings), *doubts(readings.system, profile)):
        (warn or _silent)(line)
    return profile


def _silent(_line: str) -> None:
    """Nobody listens."""


def _read(effort: _Effort, *, threads: int | None, broker: BrokerSettings | None, tell: Tell) -> Readings:
    system, room = read_system(), memory_room()
    n_threads = threads or system.threads
    # The link comes first: a wrong address should not cost half a minute.
    link = None
    if broker is not None:
        tell(f"link to broker {broker.address}")
        link = measure_link(broker, budget_s=effort.link_s)
    tell("memory and start of an empty worker")
    worker = measure_empty_worker()
    thermal, load = read_thermal(), read_load()
    tell("memory bandwidth")
    copy = copy_bandwidth(threads=n_threads, available_bytes=room.available_bytes, repetition=effort.copy)
    product = matrix_product(threads=n_threads)
    tell(product.description)
    with own_clock(threads=n_threads) as clock:
        product_rate = sustained_rate(product.run, work=product.flops, repetition=effort.product, clock=clock)
    # Training comes last, on a device that is warm by now.
    steps = training_steps(threads=n_threads)
    tell(steps[0].description)
    with own_clock(threads=n_threads) as clock:
        jobs = [(step.run, step.flops) for step in steps]
        rates = sustained_rates(jobs, repetition=effort.training, clock=clock)
    return Readings(
        system=system,
        room=room,
        link=link,
        worker=worker,
        copy=copy,
        product=product_rate,
        product_of=product.description,
        training=rates[0],
        training_of=steps[0].description,
        steps=tuple(step.timed(step.flops / rate.per_s) for step, rate in zip(steps, rates, strict=True)),
        thermal=read_thermal().since(thermal),
        others=read_load().others_since(load),
    )


def to_profile(
    readings: Readings, *, effort: str, threads: int | None, name: str | None, disk_free: int
) -> DeviceProfile:
    """The readings as a profile; every value says how and when it was measured."""
    system, room, link = readings.system, readings.room, readings.link
    note = _Source(effort=effort, threads=threads or system.threads)
    worker, celsius = readings.worker, readings.thermal.temperature_celsius
    board = f"{system.board}, " if system.board else ""
    return DeviceProfile(
        name=name or suggested_name(system),
        description=f"{board}{system.processor}; {effort} measurement with {note.threads} threads",
        architecture=system.machine,
        processor=system.processor,
        cores=note.measured(system.cores, system.cores_source),
        clock_hz=note.clock(system),
        flops_per_cycle=Quantity(value=system.flops_per_cycle, basis="specified", source=system.flops_per_cycle_source),
        gemm_flops_per_s=note.rate(readings.product.per_s, readings.product, readings.product_of),
        training_flops_per_s=note.rate(readings.training_per_s, readings.training, readings.training_of),
        step_rates=note.step_rates(readings),
        memory_bandwidth_bytes_per_s=note.rate(readings.copy.per_s, readings.copy, "copy"),
        memory_total_bytes=note.measured(room.total_bytes, "the machine's memory and control groups"),
        memory_available_bytes=note.measured(room.available_bytes, room.bound_by),
        runtime_base_bytes=None if worker is None else note.measured(worker.resident_bytes, _EMPTY_WORKER),
        worker_start_s=None if worker is None else note.measured(worker.start_s, _EMPTY_WORKER),
        disk_free_bytes=note.measured(disk_free, "free for an ordinary user"),
        # Frost is possible on a mast; a quantity cannot be negative, and below zero nothing throttles.
        temperature_celsius=None
        if celsius is None
        else note.measured(max(0.0, celsius), "hottest sensor, after training"),
        throttled=readings.thermal.throttled,
        link_down_bytes_per_s=None if link is None else note.measured(link.down_bytes_per_s, "payload from the broker"),
        link_up_bytes_per_s=None if link is None else note.measured(link.up_bytes_per_s, "payload to the broker"),
        link_round_trip_s=None if link is None else note.measured(link.round_trip_s, "to the broker and back, median"),
    )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Makes quantities that say how and when they were measured."""

    effort: str
    threads: int

    def measured(self, value: float, detail: str) -> Quantity:
        day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        how = f"measured {day} by reft-edge profile-device {reft_edge.__version__}, {self.effort}: {detail}"
        readable = value if float(value).is_integer() else float(f"{value:.{_DIGITS}g}")
        return Quantity(value=readable, basis="measured", source=how)

    def rate(self, value: float, rate: Rate, workload: str) -> Quantity:
        quality = f"best quarter of {rate.n_batches} batches within {rate.spread:.1%}"
        return self.measured(value, f"{workload}, {self.threads} threads, {quality}")

    def step_rates(self, readings: Readings) -> StepRates:
        """Fitted to the steps; where the board throttles, as slow as the reference step then was."""
        expected = expected_speed(
            product_flops_per_s=readings.product.per_s,
            moved_bytes_per_s=readings.copy.per_s,
            clock_hz=readings.system.clock_hz,
        )
        fitted = fit_speed(readings.steps, expected).slowed(readings.training.per_s / readings.training_per_s)
        how = f"fitted to {len(readings.steps)} training steps, {self.threads} threads"
        return StepRates(
            product_flops_per_s=self.measured(fitted.product_flops_per_s, how),
            moved_bytes_per_s=self.measured(fitted.moved_bytes_per_s, how),
            call_s=self.measured(fitted.call_s, how),
        )

    def clock(self, system: System) -> Quantity:
        if system.clock_source.startswith("assumed"):
            return Quantity(value=system.clock_hz, basis="specified", source=system.clock_source)
        return self.measured(system.clock_hz, system.clock_source)


def disturbances(readings: Readings) -> Iterator[str]:
    """What made the figures lower or less certain than they might be."""
    if readings.thermal.throttled:
        yield "the board throttles (too hot, or its power supply too weak): cool it, or count on these figures"
    if readings.others > NOTABLE_SHARE:
        yield f"others took {readings.others:.0%} of the processor: figures may be low; measure an idle device"
    for what, rate in (("the matrix product", readings.product), ("training", readings.training)):
        if rate.slowed:
            speeds = f"from {rate.per_s / 1e9:.3g} to {rate.late_per_s / 1e9:.3g} GFLOP/s"
            yield f"{what} slowed down while it was measured, {speeds}: too hot, or disturbed"
        if not rate.stable:
            times = f"{rate.n_batches} batches, the best apart by {rate.spread:.0%}"
            yield f"{what} did not settle in the time it had ({times}); measure again, without --quick"


def doubts(system: System, profile: DeviceProfile) -> Iterator[str]:
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
