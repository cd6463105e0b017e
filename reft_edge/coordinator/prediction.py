"""How long one round of one variant takes on one device, and how much memory.

Everything follows from the compiled step's `Cost`, the `DeviceProfile` and the workload; what earlier rounds measured
corrects it. Times are expectations. Memory is meant as an upper bound: a worker that runs out of memory has cost a
round, one that was given a smaller variant has cost a little accuracy.

Pure: no clock, no I/O. Which variant a device gets is `policies`' and `planning`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, exp, log

import msgspec

from reft_edge.bundle.manifest import Cost, Manifest
from reft_edge.bundle.memory import LEAST_SHARE, model_memory_bytes
from reft_edge.coordinator.records import Prediction
from reft_edge.coordinator.timing import Timing, total_s
from reft_edge.data.dataset import n_batches
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.codec_names import Codec, Float16, Int8
from reft_edge.wire.codecs import encoded_bytes
from reft_edge.wire.compensation_names import Compensation, ErrorFeedbackOptions, kept_states
from reft_edge.wire.messages import Measured

DEFAULT_LINK_BYTES_PER_S = 1.25e6
"""10 Mbit/s, for devices whose profile does not know their link."""

WINDOW_BYTES = 8 * 65536
"""Blocks that a receiver has asked for at most; no more than this travels in one round trip."""

ROUND_TRIPS = 6
"""Of control messages before and after the blocks of a transfer: task, manifest, offers, receipts."""

RECENT = 5
"""Rounds that a correction looks back: a median over them forgets one bad round, and follows a warmer summer."""

MEMORY_MARGIN = 1.1
"""Over the largest measured peak: what did not happen in the last rounds may happen in the next."""

PACED = 1.05
"""A round that took no longer than this beside its pauses alone says nothing about the device's own speed."""

FIRST_LIMITS = (1 / 3, 3.0)
"""What a single round may say about time: beyond that it is more likely a bad round than a wrong profile, and a second
one tells."""

TIME_LIMITS = (0.02, 50.0)
MEMORY_LIMITS = (LEAST_SHARE, 4.0)
"""Bounds of corrections: beyond them, a measurement says something else than how fast the device is."""

CLOCK_SLACK_S = 5.0
"""By how much a device's seconds may exceed ours: both clocks are set now and then."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What a round asks of every device."""

    local_epochs: int
    batch_size: int
    deadline_s: float
    weights_codec: Codec = Float16()
    update_codec: Codec = Int8()
    delta_codec: Codec | None = None
    """Of new weights from the second round on; None: they travel whole."""
    compensation: Compensation = ErrorFeedbackOptions()


class Correction(msgspec.Struct, frozen=True, kw_only=True):
    """How far off predictions were for one device: measured / predicted."""

    time_factor: float = 1.0
    """Of training."""
    start_factor: float = 1.0
    transfer_factor: float = 1.0
    memory_factor: float = 1.0
    """Of what the model adds to the worker."""
    failed_ratio: float | None = None
    """The highest pruning ratio at which the device ran out of memory; it gets a higher one from now on."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device as the planner sees it."""

    device: str
    profile: DeviceProfile
    training_samples: int
    holdout_samples: int = 0
    correction: Correction = Correction()
    graphs_of: float | None = None
    """Pruning ratio of the variant whose graphs it still has from the last round."""
    has_base: bool = False
    """Whether it still has that variant's last weights, too, so that a delta is enough."""


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One rung of the ladder: a compiled variant and what it weighs."""

    ratio: float
    cost: Cost
    graph_bytes: int
    """Manifest and both graphs, compressed."""
    weight_bytes: int
    """The variant's state in float32."""
    down_bytes: int
    """All that travels to a device that has nothing of it yet."""
    delta_bytes: int
    """What travels to a device that has its graphs and its last weights."""
    up_bytes: int
    sample_bytes: int
    """One sample of the input."""

    @classmethod
    def of(cls, manifest: Manifest, *, ratio: float, workload: Workload) -> Option:
        graphs = manifest.training_graph.size_bytes + manifest.inference_graph.size_bytes + len(manifest.to_json())
        weights = encoded_bytes(manifest.tensors, workload.weights_codec)
        delta = weights if workload.delta_codec is None else encoded_bytes(manifest.tensors, workload.delta_codec)
        return cls(
            ratio=ratio,
            cost=manifest.cost,
            graph_bytes=graphs,
            weight_bytes=manifest.weight_bytes,
            down_bytes=graphs + weights,
            delta_bytes=min(weights, delta),
            up_bytes=encoded_bytes(manifest.tensors, workload.update_codec),
            sample_bytes=manifest.sample_bytes,
        )


def predict(device: Device, option: Option, workload: Workload) -> Prediction:
    """Time and memory of one round of `option` on `device`."""
    profile, correction = device.profile, device.correction
    epochs, n_samples, n_held = workload.local_epochs, device.training_samples, device.holdout_samples
    batch = min(workload.batch_size, max(1, n_samples))
    timing = Timing(profile=profile, cost=option.cost, sample_bytes=option.sample_bytes)
    epoch = timing.epoch(n_samples, workload.batch_size)
    evaluation = timing.evaluation(n_held, workload.batch_size)
    down_bytes = missing_bytes(device, option)
    download_s = _transfer_s(down_bytes, profile.link_down_bytes_per_s, profile)
    start_s = timing.start_s() + total_s(evaluation)
    base = profile.planning_base_bytes
    model = model_memory_bytes(
        option.cost,
        weight_bytes=option.weight_bytes,
        batch_size=batch,
        data_bytes=(n_samples + n_held) * option.sample_bytes,
        kept_states=kept_states(workload.compensation),
    )
    return Prediction(
        download_s=download_s * correction.transfer_factor,
        start_s=start_s * correction.start_factor,
        steps=epochs * n_batches(n_samples, workload.batch_size),
        step_s=timing.step(batch).seconds(correction.time_factor),
        training_s=epochs * total_s(epoch, correction.time_factor),
        evaluation_s=total_s(evaluation, correction.time_factor),
        upload_s=_transfer_s(option.up_bytes, profile.link_up_bytes_per_s, profile) * correction.transfer_factor,
        peak_memory_bytes=base + model * correction.memory_factor,
        down_bytes=down_bytes,
        up_bytes=option.up_bytes,
        uncorrected_download_s=download_s,
        uncorrected_start_s=start_s,
        uncorrected_training_s=epochs * sum(part.count * part.own_s for part in epoch),
        paced_training_s=epochs * sum(part.count * part.paced_s for part in epoch),
        uncorrected_peak_memory_bytes=base + model,
        base_memory_bytes=base,
    )


def missing_bytes(device: Device, option: Option) -> int:
    """What travels down to the device, by what it still has."""
    if device.graphs_of != option.ratio:
        return option.down_bytes
    return option.delta_bytes if device.has_base else option.down_bytes - option.graph_bytes


def unfit(device: Device, option: Option, prediction: Prediction) -> str:
    """Why the variant does not fit the device's memory or disk, whatever the time; empty if it does."""
    available = device.profile.planning_memory_bytes
    if prediction.peak_memory_bytes > available:
        need = ceil(prediction.peak_memory_bytes / 2**20)
        return f"needs {need} MiB of memory at ratio {option.ratio:.3g} but has {int(available / 2**20)} MiB"
    disk = device.profile.disk_free_bytes
    # Blobs as they travel, the weights that a delta starts from, the update, and the residual of its codec.
    base_bytes = option.down_bytes - option.graph_bytes
    need_disk = option.down_bytes + base_bytes + option.up_bytes + option.weight_bytes
    if disk is not None and need_disk > disk.value:
        need = ceil(need_disk / 2**20)
        return f"needs {need} MiB of disk at ratio {option.ratio:.3g} but has {int(disk.value / 2**20)} MiB"
    return ""


def correct(history: Iterable[tuple[Prediction, Measured]], *, failed_ratios: Iterable[float] = ()) -> Correction:
    """What the rounds of one device, oldest first, say about its next one.

    `failed_ratios`: pruning ratios at which it ran out of memory.
    """
    rounds = list(history)[-RECENT:]
    memory = [
        (measured.peak_memory_bytes - expected.base_memory_bytes)
        / (expected.uncorrected_peak_memory_bytes - expected.base_memory_bytes)
        for expected, measured in rounds
        if measured.peak_memory_bytes > 0 and expected.uncorrected_peak_memory_bytes > expected.base_memory_bytes
    ]
    return Correction(
        time_factor=_typical(_slowness(expected, measured) for expected, measured in rounds),
        start_factor=_typical(_ratio(measured.start_s, expected.uncorrected_start_s) for expected, measured in rounds),
        transfer_factor=_typical(
            _ratio(measured.download_s, expected.uncorrected_download_s) for expected, measured in rounds
        ),
        memory_factor=_bounded(max(memory) * MEMORY_MARGIN, MEMORY_LIMITS) if memory else 1.0,
        failed_ratio=max(failed_ratios, default=None),
    )


def believable(measured: Measured, *, elapsed_s: float) -> Measured:
    """What a device says it measured, without times that cannot be: all of it within `elapsed_s`.

    A time of 0 is unknown and corrects nothing. One that is too short cannot be seen from here; its correction is
    bounded, and it concerns nobody but the device itself.
    """
    if measured.download_s + measured.start_s + measured.training_s <= elapsed_s + CLOCK_SLACK_S:
        return measured
    return msgspec.structs.replace(measured, download_s=0.0, start_s=0.0, training_s=0.0)


def _slowness(expected: Prediction, measured: Measured) -> float | None:
    """By how much the device's own work took longer than expected; None where the round does not tell."""
    ratio = _ratio(measured.training_s, expected.uncorrected_training_s)
    if ratio is not None and measured.training_s <= PACED * expected.paced_training_s:
        return min(ratio, 1.0)  # the rest was pauses: the device could be as fast as expected
    return ratio


def _ratio(measured: float, expected: float) -> float | None:
    """Bounded, because a device may measure nonsense whose ratio is 0 or infinite; None where something is unknown."""
    return _bounded(measured / expected, TIME_LIMITS) if measured > 0 and expected > 0 else None


def _typical(ratios: Iterable[float | None]) -> float:
    """The median of measured / predicted, in logarithms. Of the two in the middle of an even number, the nearer to 1.

    So one bad round among two or more changes nothing that a good one does not say as well; of a single one not more
    is believed than `FIRST_LIMITS`.
    """
    logs = sorted(log(ratio) for ratio in ratios if ratio is not None)
    if not logs:
        return 1.0
    if len(logs) == 1:
        return _bounded(exp(logs[0]), FIRST_LIMITS)
    return exp(min(logs[(len(logs) - 1) // 2], logs[len(logs) // 2], key=abs))


def _bounded(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _transfer_s(n_bytes: int, link: Quantity | None, profile: DeviceProfile) -> float:
    """Seconds until `n_bytes` have arrived, block by block within the window."""
    rate = link.value if link is not None and link.value > 0 else DEFAULT_LINK_BYTES_PER_S
    round_trip = profile.link_round_trip_s.value if profile.link_round_trip_s is not None else 0.0
    if round_trip > 0:
        rate = min(rate, WINDOW_BYTES / round_trip)
    return n_bytes / rate + ROUND_TRIPS * round_trip
