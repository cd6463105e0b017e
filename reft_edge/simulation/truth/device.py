"""One emulated device: the product's supervisor and worker, with a folder of its own.

What the daemon does around them (broker, transfers, session) takes neither time nor memory of the worker, so it is left
out; the coordinator's figures for a task that arrives are the same.
"""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from reft_edge.agent.protocol import (
    Command,
    Configure,
    DataDescribed,
    DataRefused,
    DescribeData,
    DeviceMeasured,
    Finished,
    MeasureDevice,
    MeasuringFailed,
    TaskFailed,
    Train,
)
from reft_edge.agent.session_words import Residual
from reft_edge.agent.settings import Limits, limited_profile
from reft_edge.agent.spool import Spool
from reft_edge.agent.supervisor import Supervisor, WorkerEnded, WorkerSaid
from reft_edge.bundle.bundle import Bundle
from reft_edge.bundle.manifest import Manifest
from reft_edge.data.description import DataDescription
from reft_edge.data.settings import DataSettings
from reft_edge.errors import FederationError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.simulation.truth.outside import Outside
from reft_edge.simulation.truth.quota import Quota
from reft_edge.simulation.truth.records import Emulation
from reft_edge.wire.codec_names import Codec
from reft_edge.wire.codecs import encode_tensors
from reft_edge.wire.messages import Measured, Task, TrainingPlan, WeightsRef

TIMEOUT_S = 600.0
"""Longer than any case may take; a worker that is silent for so long has hung."""

HOLDOUT_FRACTION = 0.1

_DATA = "data.npz"

Wanted = TypeVar("Wanted")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A round as the device reports it, and as it was seen."""

    measured: Measured
    outside: Outside


class EmulatedDevice:
    """A device in `folder`, with random samples for one model. Close it; it then leaves no process."""

    def __init__(self, folder: Path, emulation: Emulation) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.emulation = emulation
        self._folder = folder
        self._limits = Limits(threads=emulation.threads)
        self._spool = Spool(folder / "spool", max_blob_bytes=self._limits.max_model_bytes)
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._quota = Quota(emulation.quota) if emulation.quota is not None else None
        self._supervisor = self._new_supervisor()
        self._residual: Residual | None = None

    def close(self) -> None:
        """End the worker."""
        self._supervisor.stop()
        if self._quota is not None:
            self._quota.close()

    def measure(self, *, quick: bool) -> DeviceProfile:
        """What the device announces: measured by a worker of its own, within what its owner grants."""
        self._supervisor.stop()
        self._limits = Limits(threads=self.emulation.threads)
        self._supervisor = self._new_supervisor()
        profile = self._ask(MeasureDevice(quick=quick), DeviceMeasured).profile
        self._supervisor.stop()
        if self.emulation.pace is not None:
            granted = self.emulation.pace * profile.planning_flops_per_s
            self._limits = Limits(threads=self.emulation.threads, training_flops_per_s=granted)
        self._supervisor = self._new_supervisor()
        return limited_profile(profile, self._limits)

    def take_samples(self, manifest: Manifest, n_samples: int, seed: int) -> DataDescription:
        """Random samples that the model takes; what they say takes a processor no more and no less time."""
        rng = np.random.default_rng(seed)
        inputs = rng.standard_normal((n_samples, *manifest.input.shape), dtype=np.float32)
        targets = np.arange(n_samples) % manifest.output.shape[0]
        np.savez(self._folder / _DATA, inputs=inputs, targets=targets)
        self.let_worker_go()
        description = self._ask(DescribeData(), DataDescribed).description
        self.let_worker_go()
        return description

    def let_worker_go(self) -> None:
        """The next task finds no warm worker, and nothing left of earlier ones."""
        self._supervisor.stop()
        self._supervisor = self._new_supervisor()
        self._residual = None

    def train(self, bundle: Bundle, plan: TrainingPlan, *, weights_codec: Codec, task: str) -> Trained:
        """One round. Raises `FederationError` when it fails."""
        blobs = self._spool.blobs
        for graph in (bundle.training_graph, bundle.inference_graph):
            blobs.put(graph)
        message = Task(
            task=task,
            round=1,
            run="truth",
            bundle=blobs.put(bundle.manifest.to_json()),
            weights=WeightsRef(blob=blobs.put(encode_tensors(bundle.tensors(), weights_codec)), codec=weights_codec),
            plan=plan,
            deadline=0.0,
        )
        self._send(Train(task=message, residual=self._residual, asked_at=time.monotonic()))
        if (worker := self._supervisor.worker) is None:
            raise FederationError(f"{self.emulation.name}: the worker has not been started")
        with Outside(worker) as outside:
            finished = self._answer(Finished)
        self._residual = finished.residual
        return Trained(measured=finished.measured, outside=outside)

    def _new_supervisor(self) -> Supervisor:
        configure = Configure(
            device=self._folder.name,
            data=DataSettings(path=_DATA, holdout_fraction=HOLDOUT_FRACTION),
            base_dir=str(self._folder),
            spool=str(self._spool.root),
            limits=self._limits,
        )
        return Supervisor(configure, self._events)

    def _ask(self, command: Command, kind: type[Wanted]) -> Wanted:
        self._send(command)
        return self._answer(kind)

    def _send(self, command: Command) -> None:
        """The worker is started by the first command, and then belongs to the group that we are in."""
        bound = self._quota is not None and self._supervisor.worker is None
        with self._quota.joined() if bound and self._quota is not None else contextlib.nullcontext():
            self._supervisor.send(command)

    def _answer(self, kind: type[Wanted]) -> Wanted:
        """The answer of that kind; progress is passed over. Raises `FederationError` for any other end."""
        while True:
            try:
                event = self._events.get(timeout=TIMEOUT_S)
            except queue.Empty as exc:
                raise FederationError(f"{self.emulation.name}: the worker is silent for {TIMEOUT_S:.0f} s") from exc
            if event.worker != self._supervisor.worker:
                continue  # an earlier worker's last words
            said = event.answer if isinstance(event, WorkerSaid) else event
            match said:
                case WorkerEnded() | TaskFailed() | MeasuringFailed() | DataRefused():
                    raise FederationError(f"{self.emulation.name}: {said.reason}")
                case _ if isinstance(said, kind):
                    return said
