"""What is compared, and what one comparison found."""

from __future__ import annotations

import msgspec


class Emulation(msgspec.Struct, frozen=True, kw_only=True):
    """A device that this machine stands in for."""

    name: str
    threads: int = 1
    quota: float | None = None
    """Processor time in cores that a control group leaves to the worker."""
    pace: float | None = None
    """Granted speed, as a share of what the device measured for its reference step."""


DEVICES = (
    Emulation(name="1 thread"),
    Emulation(name="2 threads", threads=2),
    Emulation(name="half a core", quota=0.5),
    Emulation(name="paced to 20%", pace=0.2),
    Emulation(name="paced to 5%", pace=0.05),
)
"""As fast as the machine is, slowed by the kernel, and slowed by the owner's limit."""


class TruthSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Models, variants and devices of one benchmark."""

    models: tuple[str, ...] = ("vgg_small", "digits_cnn", "sensor_cnn", "resnet_small", "mobilenet_v2")
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.625, 0.75)
    devices: tuple[Emulation, ...] = DEVICES
    rounds: int = 3
    batch_size: int = 32
    training_s: float = 4.0
    """That a round's training should about take: epochs are chosen by the planner's own prediction."""
    longest_s: float = 30.0
    """A variant that takes longer than this for an epoch on a device is left out there."""
    samples: int = 320
    """On each device, a tenth of them held out."""
    quick_profile: bool = True
    seed: int = 0


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One variant on one device."""

    device: str
    model: str
    ratio: float


class RoundTruth(msgspec.Struct, frozen=True, kw_only=True):
    """One round, predicted with what earlier ones of the case had corrected, and measured. Seconds and bytes."""

    predicted_training_s: float
    measured_training_s: float
    predicted_start_s: float
    measured_start_s: float
    predicted_peak_bytes: float
    measured_peak_bytes: float
    """As the device reports it."""
    seen_peak_bytes: float
    """Largest resident memory of the worker that was seen from outside, every hundredth of a second."""
    cpu_s: float
    """Of the worker, from the command to its answer."""
    others_share: float
    """Of the machine's processor time that others took meanwhile."""


class TruthRun(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds of a case."""

    case: Case
    parameters: int
    epochs: int
    steps: int
    """Of all epochs of a round."""
    training_flops_per_s: float
    """As the device measured itself, right before."""
    single_figure_s: float
    """What training would be predicted to take with that one figure for all models."""
    rounds: tuple[RoundTruth, ...] = ()
    skipped: str = ""
    """Why it was not run; empty if it was."""
