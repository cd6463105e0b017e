"""Predict, run, correct, predict again: the planner's own functions against a worker's own figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path

import msgspec

from reft_edge.bundle.bundle import Bundle
from reft_edge.config import convert_settings
from reft_edge.coordinator.prediction import Correction, Device, Option, Workload, correct, predict
from reft_edge.coordinator.records import Prediction
from reft_edge.errors import ResourceError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.simulation.truth.device import EmulatedDevice, Trained
from reft_edge.simulation.truth.records import Case, Emulation, RoundTruth, TruthRun, TruthSettings
from reft_edge.wire.messages import Measured, TrainingPlan

DEADLINE_S = 3600.0
"""Of no account here: every variant is run on every device."""


def cases(settings: TruthSettings) -> Iterator[Case]:
    """All of them, device by device and model by model, so that a profile is as fresh as it can be."""
    for device in settings.devices:
        for model in settings.models:
            for ratio in settings.ratios:
                yield Case(device=device.name, model=model, ratio=ratio)


class Variants:
    """Compiled variants of the zoo's models, made when they are first wanted."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._bundles: dict[tuple[str, float], Bundle] = {}

    def bundle(self, model: str, ratio: float) -> Bundle:
        """One variant, pruned and compiled as a federation would."""
        if (model, ratio) not in self._bundles:
            from reft_edge.coordinator.catalogue import Workshop, initial_model
            from reft_edge.coordinator.settings import ModelSettings
            from reft_edge.models.registry import ZOO

            entry = ZOO[model]
            table = {
                "name": model,
                "input_shape": list(entry.input_shape),
                "n_outputs": entry.n_outputs,
                "optimizer": {"name": "sgd", "momentum": 0.9},
            }
            settings = convert_settings(table, ModelSettings, origin="the planner benchmark")
            module = initial_model(settings, base_dir=Path.cwd(), seed=self._seed)
            workshop = Workshop(module, settings, importance="magnitude", seed=self._seed)
            self._bundles[model, ratio], _ = workshop.make(ratio)
        return self._bundles[model, ratio]


def play(
    settings: TruthSettings, wanted: list[Case], folder: Path, *, say: Callable[[str], None]
) -> Iterator[TruthRun]:
    """Run the wanted cases in order; `folder` is for what lies on the devices."""
    variants = Variants(settings.seed)
    for emulation in settings.devices:
        of_device = [case for case in wanted if case.device == emulation.name]
        for model in settings.models:
            of_model = [case for case in of_device if case.model == model]
            if of_model:
                for case in of_model:
                    variants.bundle(model, case.ratio)  # compiled before anything is measured
                yield from _play_model(settings, emulation, of_model, variants, folder, say)


def _play_model(
    settings: TruthSettings,
    emulation: Emulation,
    wanted: list[Case],
    variants: Variants,
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[TruthRun]:
    try:
        device = EmulatedDevice(folder / emulation.name.replace(" ", "-").replace("%", ""), emulation)
    except ResourceError as exc:
        for case in wanted:
            yield _skipped(case, str(exc))
        return
    try:
        say(f"{emulation.name}: measuring the device")
        profile = device.measure(quick=settings.quick_profile)
        for case in wanted:
            yield _play_case(settings, device, profile, case, variants.bundle(case.model, case.ratio), say)
    finally:
        device.close()


def _play_case(
    settings: TruthSettings,
    device: EmulatedDevice,
    profile: DeviceProfile,
    case: Case,
    bundle: Bundle,
    say: Callable[[str], None],
) -> TruthRun:
    data = device.take_samples(bundle.manifest, settings.samples, settings.seed)
    planned = Device(
        device=case.device,
        profile=profile,
        training_samples=data.training_samples,
        holdout_samples=data.holdout_samples,
    )
    workload = Workload(local_epochs=1, batch_size=settings.batch_size, deadline_s=DEADLINE_S)
    option = Option.of(bundle.manifest, ratio=case.ratio, workload=workload)
    epoch_s = predict(planned, option, workload).training_s
    if epoch_s > settings.longest_s:
        return _skipped(case, f"an epoch would take {epoch_s:.0f} s")
    workload = msgspec.structs.replace(workload, local_epochs=ceil(settings.training_s / epoch_s))
    name = f"{case.device}, {case.model} x {1 - case.ratio:.3g}"
    history: list[tuple[Prediction, Measured]] = []
    rounds: list[RoundTruth] = []
    for number in range(settings.rounds):
        correction = correct(history) if history else Correction()
        expected = predict(msgspec.structs.replace(planned, correction=correction), option, workload)
        trained = device.train(
            bundle, _plan(settings, workload), weights_codec=workload.weights_codec, task=f"round-{number + 1}"
        )
        history.append((expected, trained.measured))
        rounds.append(_round(expected, trained))
        say(f"{name}, round {number + 1}: {_words(rounds[-1])}")
    figure = profile.planning_flops_per_s
    flops = workload.local_epochs * data.training_samples * bundle.manifest.cost.step_flops_per_sample
    return TruthRun(
        case=case,
        parameters=bundle.manifest.cost.parameters,
        epochs=workload.local_epochs,
        steps=history[0][1].steps,
        training_flops_per_s=figure,
        single_figure_s=flops / figure,
        rounds=tuple(rounds),
    )


def _plan(settings: TruthSettings, workload: Workload) -> TrainingPlan:
    return TrainingPlan(
        local_epochs=workload.local_epochs,
        batch_size=workload.batch_size,
        learning_rate=1e-4,  # random targets teach nothing; nothing may diverge
        seed=settings.seed,
        update_codec=workload.update_codec,
    )


def _round(expected: Prediction, trained: Trained) -> RoundTruth:
    measured, outside = trained.measured, trained.outside
    return RoundTruth(
        predicted_training_s=expected.training_s,
        measured_training_s=measured.training_s,
        predicted_start_s=expected.start_s,
        measured_start_s=measured.start_s,
        predicted_peak_bytes=expected.peak_memory_bytes,
        measured_peak_bytes=measured.peak_memory_bytes,
        seen_peak_bytes=outside.peak_bytes,
        cpu_s=outside.cpu_s,
        others_share=outside.others_share,
    )


def _words(found: RoundTruth) -> str:
    return (
        f"training {found.predicted_training_s:.2f} s predicted, {found.measured_training_s:.2f} s measured "
        f"({found.predicted_training_s / found.measured_training_s - 1:+.0%}); start {found.predicted_start_s:.2f}, "
        f"{found.measured_start_s:.2f} s; memory {found.predicted_peak_bytes / 2**20:.0f}, "
        f"{found.measured_peak_bytes / 2**20:.0f} MiB "
        f"({found.predicted_peak_bytes / found.measured_peak_bytes - 1:+.0%})"
    )


def _skipped(case: Case, reason: str) -> TruthRun:
    return TruthRun(
        case=case, parameters=0, epochs=0, steps=0, training_flops_per_s=0.0, single_figure_s=0.0, skipped=reason
    )
