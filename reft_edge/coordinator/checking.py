"""`--check`: everything that can go wrong before the first device is asked, tried out, and nothing started.

The model is built and the data are loaded (`preparation`), then variants are pruned and compiled: with device profiles,
those that a plan for them considers; without, every rung of the ladder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from reft_edge.coordinator.assigning import workload_of
from reft_edge.coordinator.planning import Assignment, plan
from reft_edge.coordinator.policies import Ladder
from reft_edge.coordinator.prediction import Device, Option
from reft_edge.errors import ModelError

if TYPE_CHECKING:
    from reft_edge.coordinator.preparation import Preparation
    from reft_edge.profiling.profile import DeviceProfile

ASSUMED_SAMPLES = 1000
"""Training samples of a device that is known by its profile only."""


class CheckedVariant(msgspec.Struct, frozen=True, kw_only=True):
    ratio: float
    parameters: int
    forward_macs: int
    graph_bytes: int
    """Manifest and graphs, as they travel."""
    down_bytes: int
    """All that travels to a device that has nothing yet."""
    seconds: float
    """That pruning and compiling took."""


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found."""

    federation: str
    model: str
    parameters: int
    public_samples: int
    test_samples: int
    variants: list[CheckedVariant]
    unprunable: str
    """Why there are no smaller variants; empty if there are. The whole model can be trained all the same."""
    devices: list[Assignment]
    """The plan for the given profiles."""


def check(
    preparation: Preparation,
    *,
    profiles: Sequence[DeviceProfile] = (),
    tell: Callable[[CheckedVariant], None] | None = None,
) -> CheckReport:
    """Prune, compile and plan. Raises `ModelError` when the whole model cannot be compiled, or is not on the ladder."""
    settings, workshop = preparation.settings, preparation.workshop()
    workload = workload_of(settings)
    variants: list[CheckedVariant] = []

    def price(ratio: float) -> Option:
        began = time.perf_counter()
        bundle, _ = workshop.make(ratio)
        option = Option.of(bundle.manifest, ratio=ratio, workload=workload)
        variants.append(
            CheckedVariant(
                ratio=ratio,
                parameters=option.cost.parameters,
                forward_macs=option.cost.forward_macs,
                graph_bytes=option.graph_bytes,
                down_bytes=option.down_bytes,
                seconds=time.perf_counter() - began,
            )
        )
        if tell is not None:
            tell(variants[-1])
        return option

    ladder = Ladder(workshop.ladder(settings.planning.ratios), price)
    assignments: list[Assignment] = []
    unprunable = ""
    if profiles:
        assignments = plan(
            [Device(device=profile.name, profile=profile, training_samples=ASSUMED_SAMPLES) for profile in profiles],
            workload=workload,
            ladder=ladder,
            policy=settings.planning.policy,
            max_variants=settings.planning.max_variants,
        )
    else:
        unprunable = _climb(ladder)
    options = preparation.options
    return CheckReport(
        federation=settings.federation,
        model=settings.model.name,
        parameters=sum(parameter.numel() for parameter in preparation.model.parameters()),
        public_samples=0 if options.public is None else len(options.public),
        test_samples=0 if options.test is None else len(options.test),
        variants=sorted(variants, key=lambda variant: variant.ratio),
        unprunable=unprunable,
        devices=assignments,
    )


def _climb(ladder: Ladder) -> str:
    """Compile every rung; returns why those below the whole model cannot be had, as a plan would take it."""
    for rung, ratio in enumerate(ladder.ratios):
        try:
            ladder.option(rung)
        except ModelError as exc:
            if rung == 0 or ladder.ratios[0] != 0 or not ladder.priced(0):
                raise
            return f"ratio {ratio:.3g}: {exc}"
    return ""
