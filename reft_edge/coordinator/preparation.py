"""From settings to things: keys, the model, the data, the options of learning. What `--check` checks first.

Nothing here connects, writes or trains, so every mistake in federation.toml that concerns the model or the data is
found before a device is asked for anything.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.bundle.manifest import CrossEntropy
from reft_edge.compile.importance import find_importance
from reft_edge.coordinator.catalogue import Workshop, initial_model
from reft_edge.coordinator.learning import LearningOptions
from reft_edge.coordinator.settings import run_digest
from reft_edge.coordinator.trust import Trust
from reft_edge.data.load import load_dataset
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.coordinator.settings import FederationSettings, ModelSettings
    from reft_edge.data.dataset import Dataset
    from reft_edge.data.settings import DataSettings


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that settings name, built and checked."""

    settings: FederationSettings
    base_dir: Path
    """Folder of federation.toml."""
    model: nn.Module
    """The model before the first round; stays as it is."""
    options: LearningOptions
    trust: Trust | None = None
    """What tasks are signed with, and whose certificates count; None where nothing is signed."""

    @property
    def directory(self) -> Path:
        """Where results and the store go."""
        return self.base_dir / self.settings.output.directory

    @property
    def digest(self) -> str:
        """What makes a run this run: `run_digest`, and the model's tensors, which a changed model.py changes."""
        layout = [(name, tuple(tensor.shape)) for name, tensor in self.model.state_dict().items()]
        return hashlib.sha256(f"{run_digest(self.settings)} {layout!r}".encode()).hexdigest()

    def workshop(self) -> Workshop:
        return Workshop(
            self.model,
            self.settings.model,
            importance=self.settings.planning.importance,
            seed=self.settings.seed,
            limits=self.settings.planning.limits,
        )

    def fresh_model(self) -> nn.Module:
        """Another instance of the model, to be changed."""
        return initial_model(self.settings.model, base_dir=self.base_dir, seed=self.settings.seed)


def prepare(settings: FederationSettings, base_dir: Path) -> Preparation:
    """Read the keys, build the model and load the data. Raises `ConfigError`, `ModelError` or `DataError`."""
    trust = None
    if settings.trust is not None:
        trust = Trust.read(settings.trust.resolved_in(base_dir), now=datetime.now(UTC))
    find_importance(settings.planning.importance)
    model = initial_model(settings.model, base_dir=base_dir, seed=settings.seed)
    test = _load(settings.data.test, settings.model, base_dir)
    if test is not None and test.targets is None:
        raise DataError("[data] test has no labels; the test set needs them, or leave it out")
    return Preparation(
        settings=settings,
        base_dir=base_dir,
        model=model,
        trust=trust,
        options=LearningOptions(
            loss=settings.model.loss_function,
            aggregation=settings.aggregation,
            distillation=settings.distillation,
            seed=settings.seed,
            public=_load(settings.data.public, settings.model, base_dir),
            test=test,
        ),
    )


def _load(source: DataSettings | None, model: ModelSettings, base_dir: Path) -> Dataset | None:
    """One of the coordinator's datasets, in the shapes and dtypes of the model."""
    if source is None:
        return None
    dataset = load_dataset(
        source, base_dir=base_dir, input_shape=model.input_shape, classes=model.classes, compact=True
    )
    classifies = isinstance(model.loss_function, CrossEntropy)
    return dataset.for_model(
        input_shape=model.input_shape,
        input_dtype=model.input_dtype,
        target_shape=() if classifies else (model.outputs,),
        target_dtype="int64" if classifies else "float32",
        n_outputs=model.outputs if classifies else None,
    )
