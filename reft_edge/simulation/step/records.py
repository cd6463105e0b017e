"""What the step benchmark runs, and what it keeps."""

from __future__ import annotations

import msgspec

BENCHMARK = "step"

CONVOLUTIONAL = ("digits_cnn", "vgg_small", "vgg16_pruned", "resnet_small", "mobilenet_v2", "sensor_cnn")
"""Models whose time must be at most torch's."""

OTHERS = ("mlp", "vit_small")

QUICK = ("digits_cnn", "vgg_small", "vgg16_pruned")


class StepSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The same for all runs of a file."""

    models: tuple[str, ...] = CONVOLUTIONAL + OTHERS
    threads: tuple[int, ...] = (1, 2)
    batch_size: int = 32
    spin: bool = False
    """Whether idle threads of onnxruntime wait by spinning, as torch's do."""
    turns: int = 12
    """How often the two sides take turns."""
    turn_s: float = 0.5
    """About how long a turn takes."""


class StepRun(msgspec.Struct, frozen=True, kw_only=True):
    """One model with one number of threads."""

    model: str
    threads: int
    parameters: int
    forward_macs: int
    """Of one sample."""
    graph_bytes: int
    """The training graph on the wire."""
    step_flops: int
    """Of one step in matrix products, by the compiled graph."""
    ours_s: float
    """Seconds for a step, median of all; `ours` is onnxruntime, `theirs` torch eager."""
    theirs_s: float
    time_ratio: float
    """Median over the turns of ours / theirs: neighbours in time, so what else the machine did counts for both."""
    cpu_ratio: float
    """The same in processor time."""
    ours_peak_bytes: int
    """Largest resident memory of the process; the other side has a process of its own."""
    theirs_peak_bytes: int
    gemm_flops_per_s: float
    """Large float32 products through onnxruntime, best turn."""
    blas_flops_per_s: float
    """The same through numpy."""
    peak_share: float
    """FLOP/s of our step's products over the whole step's time, as a share of the better of the two in the same turn;
    median over the turns."""

    @property
    def memory_ratio(self) -> float:
        return self.ours_peak_bytes / self.theirs_peak_bytes
