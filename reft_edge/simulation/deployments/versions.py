"""Versions to deploy, exported by the product as at the end of a run, from models that were trained for seconds.

They are made once, in one place and without a federation, and put into as many federations' stores as there are
trials: `put_into_store` leaves there what a coordinator leaves that has finished a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from reft_edge.bundle.manifest import SGD, CrossEntropy
from reft_edge.coordinator.records import AssignmentRecord, ExportRecord, Prediction, RoundKey, RoundRecord, RunRecord
from reft_edge.coordinator.rounds import Phase, Standing
from reft_edge.coordinator.settings import ModelSettings
from reft_edge.coordinator.store import Store
from reft_edge.errors import ResourceError
from reft_edge.simulation.digits import INPUT_SHAPE, N_CLASSES
from reft_edge.wire.messages import TrainingPlan

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.bundle.bundle import Bundle
    from reft_edge.coordinator.export import ExportedFile
    from reft_edge.simulation.digits import Digits

MODEL = ModelSettings(name="digits_cnn", input_shape=INPUT_SHAPE, n_outputs=N_CLASSES)
WHOLE, HALF = 0.0, 0.5
"""Pruning ratios of a version's models: the second is for devices that are slower."""

MODELS = "models"
"""Folder of a run's exports in the run's folder, as in `coordinator.server`."""


class VersionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a version is trained: two shall differ, and both be right."""

    seed: int
    epochs: int = 8
    """0: not trained at all."""


def make_versions(
    folder: Path, wanted: Mapping[str, VersionOptions], digits: Digits, *, ratios: Sequence[float] = (WHOLE, HALF)
) -> dict[str, list[ExportRecord]]:
    """Train and export each of `wanted` into a folder of its own in `folder`, with a model for each of `ratios`.

    Raises `ModelError` or `ResourceError`.
    """
    from reft_edge.coordinator.catalogue import Workshop, initial_model

    workshop = Workshop(initial_model(MODEL, base_dir=folder, seed=0), MODEL, importance="magnitude", seed=0)
    bundles = {ratio: workshop.make(ratio)[0] for ratio in ratios}
    made: dict[str, list[ExportRecord]] = {}
    for version, options in wanted.items():
        made[version] = []
        for ratio, bundle in bundles.items():
            module = workshop.module(ratio)
            _train(module, options, digits)
            made[version] += _export(folder / version, version, ratio, bundle, module, digits)
    return made


def put_into_store(
    results: Path,
    federation: str,
    version: str,
    exports: Sequence[ExportRecord],
    *,
    devices: Mapping[str, float],
    at: float,
) -> None:
    """A finished run called `version`, at Unix time `at`; `devices`: the ratio that each device trained in it.

    Raises `ResourceError`.
    """
    folder = results / version / MODELS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copied = [
            msgspec.structs.replace(record, path=str(shutil.copy2(record.path, folder / Path(record.path).name)))
            for record in exports
        ]
    except OSError as exc:
        raise ResourceError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    key = RoundKey(run=version, number=1)
    with closing(Store(results)) as store:
        store.create_run(RunRecord(run=version, federation=federation, settings_digest="", created_at=at))
        round_record = RoundRecord(key=key, phase=Phase.CLOSED.value, started_at=at, closed_at=at)
        store.plan_round(round_record, [_assignment(key, device, ratio) for device, ratio in devices.items()])
        for record in copied:
            store.save_export(version, record)
        store.set_run_state(version, "finished", ended_at=at)


def _assignment(key: RoundKey, device: str, ratio: float) -> AssignmentRecord:
    return AssignmentRecord(
        task=key.task(device),
        device=device,
        variant=f"{ratio:g}",
        ratio=ratio,
        prediction=Prediction(),
        plan=TrainingPlan(local_epochs=1, batch_size=32, learning_rate=0.05, seed=0),
        standing=Standing.UPDATED.value,
    )


def _train(module: nn.Module, options: VersionOptions, digits: Digits) -> None:
    from reft_edge.simulation.central import CentralOptions, train_centrally

    if options.epochs == 0:
        return
    wanted = CentralOptions(
        epochs=options.epochs,
        batch_size=32,
        learning_rate=0.05,
        optimizer=SGD(momentum=0.9),
        loss=CrossEntropy(),
        seed=options.seed,
    )
    train_centrally(module, digits.private, digits.test, wanted)


def _export(
    folder: Path, version: str, ratio: float, bundle: Bundle, module: nn.Module, digits: Digits
) -> list[ExportRecord]:
    from reft_edge.coordinator.export import export_model
    from reft_edge.coordinator.file_metadata import Origin

    name = "global" if ratio == WHOLE else f"variant-{ratio:g}"
    made = export_model(
        name=name,
        manifest=bundle.manifest,
        inference_graph=bundle.inference_graph,
        weights={key: np.asarray(tensor.detach()) for key, tensor in module.state_dict().items()},
        directory=folder,
        calibration=digits.public.inputs,
        test=digits.test,
        origin=Origin(run=version),
    )
    records = [_record(name, made.float32, ratio)]
    return records if made.int8 is None else [*records, _record(f"{name}.int8", made.int8, ratio)]


def _record(name: str, file: ExportedFile, ratio: float) -> ExportRecord:
    values: dict[str, float] = {"size_bytes": file.size_bytes, "ratio": ratio}
    if file.metrics is not None and file.metrics.accuracy is not None:
        values["accuracy"] = file.metrics.accuracy
    return ExportRecord(name=name, path=str(file.path), values=values)
