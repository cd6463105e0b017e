"""`DeviceProfile`: what one device can do, each value with where it comes from.

The planner reads profiles; the agent announces one; `profile-device` writes one as TOML; `device_profiles/` holds
reference boards. Value objects only: nothing is measured here, and neither numpy nor onnxruntime is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from reft_edge.config import convert_settings, read_toml
from reft_edge.profiling.reference import reference_step
from reft_edge.profiling.speed import Speed

SCHEMA = 1

TRAINING_SHARE_OF_THEORETICAL = 0.10
"""Share of the paper's theoretical FLOP/s that a training step sustains, for boards nobody has measured yet.

The reference step sustains 0.19 on the x86-64 machine in `device_profiles/`. What its matrix products do not explain of
the time is mostly waiting for memory, at most 0.7 bytes for each operation. With products at half of the theoretical
figure (double-precision HPL reaches 0.4 on a Raspberry Pi 4 and 5, https://github.com/geerlingguy/top500-benchmark) and
that traffic at each board's own bandwidth, the boards in `device_profiles/` come out between 0.07 and 0.16, 0.10 in the
middle. An estimate: `reft-edge profile-device` measures, and the planner corrects it after one round."""

PRODUCT_SHARE_OF_THEORETICAL = 0.5
"""Share of the theoretical FLOP/s that a large matrix product reaches, where none was measured; see above."""

BANDWIDTH_PER_FLOP = 0.1
"""Bytes that memory moves for each theoretical operation, where no bandwidth is known: the boards in
`device_profiles/` have between 0.05 and 0.4."""

CYCLES_A_CALL = 4000
"""Processor cycles for calling one node of a graph. Measured: 3000 to 8000 (onnxruntime 1.31, x86-64)."""

RUNTIME_BASE_BYTES = 64 * 2**20
"""Resident memory of a worker before it holds any tensor: Python, numpy and onnxruntime (x86-64, onnxruntime 1.31)."""


SMALLEST_VALUE, LARGEST_VALUE = 1e-9, 1e21
"""Bounds of a quantity that is not 0. No device has more of anything; beyond them plans overflow or divide by 0."""


ShortText: TypeAlias = Annotated[str, Meta(max_length=200)]
"""Stands in every event about a device, in tables and in reports."""
LongText: TypeAlias = Annotated[str, Meta(max_length=1000)]


class Quantity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number in SI base units, and where it comes from."""

    value: float
    basis: Literal["measured", "specified"]
    """`measured` on a device (then `source` says how and when) or `specified` (then `source` names the document)."""
    source: LongText = ""

    def __post_init__(self) -> None:
        if not (self.value == 0 or SMALLEST_VALUE <= self.value <= LARGEST_VALUE):
            raise ValueError(f"{self.value!r} is neither 0 nor between {SMALLEST_VALUE} and {LARGEST_VALUE}")


class StepRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates at which training steps get done, fitted to several reference steps; see `reft_edge.profiling.speed`."""

    product_flops_per_s: Quantity
    moved_bytes_per_s: Quantity
    call_s: Quantity

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if getattr(self, field).value <= 0:
                raise ValueError(f"{field} must be above 0")


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one device can do. Absent values are unknown."""

    name: ShortText
    """The kind of device, for example `raspberry-pi-4b`."""
    description: LongText = ""
    architecture: ShortText = ""
    processor: LongText = ""
    cores: Quantity
    clock_hz: Quantity
    flops_per_cycle: Quantity
    """Peak float32 operations of one core in one cycle; a fused multiply-add counts as 2."""
    gemm_flops_per_s: Quantity | None = None
    training_flops_per_s: Quantity | None = None
    """Sustained while running the reference step: the one figure to compare devices with."""
    step_rates: StepRates | None = None
    """What the times of other steps follow from; unknown: from the figures above and below."""
    granted_flops_per_s: Quantity | None = None
    """Training is paced to no more than this, whatever the device could do."""
    memory_bandwidth_bytes_per_s: Quantity | None = None
    memory_total_bytes: Quantity
    memory_available_bytes: Quantity | None = None
    """What a training process can have, cgroup limits counted."""
    runtime_base_bytes: Quantity | None = None
    """Resident memory of a worker that holds no model yet."""
    worker_start_s: Quantity | None = None
    """Until a fresh worker can train; unknown: the planner guesses from the speed."""
    disk_free_bytes: Quantity | None = None
    link_down_bytes_per_s: Quantity | None = None
    link_up_bytes_per_s: Quantity | None = None
    link_round_trip_s: Quantity | None = None
    temperature_celsius: Quantity | None = None
    throttled: bool | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"profile schema {self.schema!r} is not {SCHEMA}")
        for field in ("cores", "clock_hz", "flops_per_cycle", "memory_total_bytes"):
            if getattr(self, field).value <= 0:
                raise ValueError(f"{field} must be above 0")

    @property
    def theoretical_flops_per_s(self) -> float:
        """The paper's estimate (arXiv 2308.13662, section 3): cores x clock x operations per cycle."""
        return self.cores.value * self.clock_hz.value * self.flops_per_cycle.value

    @property
    def planning_flops_per_s(self) -> float:
        """The one figure for a device: training speed as measured, else a share of the theoretical; no more than
        granted."""
        speed = self.theoretical_flops_per_s * TRAINING_SHARE_OF_THEORETICAL
        if self.training_flops_per_s is not None and self.training_flops_per_s.value > 0:
            speed = self.training_flops_per_s.value
        granted = self.granted_flops_per_s
        return speed if granted is None else min(speed, granted.value)

    @property
    def speed(self) -> Speed:
        """How fast steps get done without pauses: the measured rates, else what is expected of such a device."""
        rates = self.step_rates
        if rates is not None:
            return Speed(
                product_flops_per_s=rates.product_flops_per_s.value,
                moved_bytes_per_s=rates.moved_bytes_per_s.value,
                call_s=rates.call_s.value,
            )
        return self._expected_speed()

    def _expected_speed(self) -> Speed:
        """What products, memory and clock let expect, scaled so that the reference step comes out as it should."""
        theoretical = self.theoretical_flops_per_s
        rough = expected_speed(
            product_flops_per_s=_known(self.gemm_flops_per_s) or theoretical * PRODUCT_SHARE_OF_THEORETICAL,
            moved_bytes_per_s=_known(self.memory_bandwidth_bytes_per_s) or theoretical * BANDWIDTH_PER_FLOP,
            clock_hz=self.clock_hz.value,
        )
        reference = reference_step()
        measured = _known(self.training_flops_per_s) or theoretical * TRAINING_SHARE_OF_THEORETICAL
        return rough.slowed(reference.flops / measured / reference.seconds(rough))

    @property
    def planning_memory_bytes(self) -> float:
        """Bytes that a training worker may occupy in all."""
        known = self.memory_available_bytes
        return known.value if known is not None else self.memory_total_bytes.value / 2

    @property
    def planning_base_bytes(self) -> float:
        """Bytes that a worker occupies before it holds a model."""
        return self.runtime_base_bytes.value if self.runtime_base_bytes is not None else RUNTIME_BASE_BYTES

    @classmethod
    def read(cls, path: Path) -> DeviceProfile:
        """Read a profile from a TOML file; raises `ConfigError` naming file and key."""
        return convert_settings(read_toml(path), cls, origin=str(path))

    def to_table(self) -> dict[str, Any]:
        """The profile as plain dictionaries, for JSON and TOML."""
        table: dict[str, Any] = msgspec.to_builtins(self)
        return table


def expected_speed(*, product_flops_per_s: float, moved_bytes_per_s: float, clock_hz: float) -> Speed:
    """Rates of training steps, as products and copies alone let expect."""
    return Speed(
        product_flops_per_s=product_flops_per_s, moved_bytes_per_s=moved_bytes_per_s, call_s=CYCLES_A_CALL / clock_hz
    )


def _known(quantity: Quantity | None) -> float:
    """The value, or 0 for one that is unknown."""
    return quantity.value if quantity is not None else 0.0
