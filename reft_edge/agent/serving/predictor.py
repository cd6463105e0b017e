"""Predict with the model that this device serves, and with the next one as soon as it is switched to.

Each call looks whether another version is served (one `stat`). If so, a thread of its own loads it while calls go on
with the one that is there; then the name changes hands. A call ends on the version that it began with, and the last
such call lets go of the old model, so for a moment there are two in memory. No call waits for a version that is being
loaded, unless it is the first one ever.

A new version that is damaged or does not load changes nothing here; it is logged, and counted as that version's error,
so that the coordinator hears that it is not what predicts. Where memory was short it is tried again.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.agent.serving.counts import CountsWriter
from reft_edge.agent.serving.onnx_model import BATCH, OnnxModel, without_answer
from reft_edge.agent.serving.prediction import Prediction
from reft_edge.agent.serving.slots import COUNTS, SERVING, InstalledModel, Slots
from reft_edge.agent.settings import AgentSettings
from reft_edge.errors import BundleError, ConfigError, ModelError, ReftError, ResourceError

if TYPE_CHECKING:
    from types import TracebackType

    from reft_edge.types import Array

RETRY_S = 30.0
"""A version that there was no memory for is tried again after this time."""

logger = logging.getLogger(__name__)


class NothingServedError(ModelError):
    """There is no model yet, or not any more."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A version in memory."""

    version: str
    model: str
    deployment: str = ""
    precision: str = ""
    sha256: str = ""
    """These three are unknown of a plain ONNX file."""
    onnx: OnnxModel


class Predictor:
    """Predicts with what `source` serves: an agent.toml, an agent's spool, or an .onnx file.

    A file is loaded once; with the others a model that is deployed later, or undone, is followed. `threads`: cores for
    one call; calls from several threads run at the same time. Raises `ConfigError` when `source` is none of these, and
    `ModelError` for an .onnx file that cannot be used.
    """

    def __init__(self, source: Path | str, *, threads: int = 1) -> None:
        self._place = _find(Path(source))
        self._threads = threads
        self._served: ServedModel | None = None
        self._stamp: object = _NEVER
        self._retry_at = 0.0
        self._loading = threading.Lock()
        self._told = ""
        self._counts: CountsWriter | None = None
        if self._place.slots is not None:
            self._counts = CountsWriter(self._place.slots.root / COUNTS, errors_only=not self._place.report)
            weakref.finalize(self, self._counts.close)  # also when Python ends
        if self._place.slots is None:
            self._served = _load_file(self._place.path, threads)
        else:
            self._follow(self._place.slots)

    def predict(self, inputs: object, *, batch_size: int = BATCH, by: ServedModel | None = None) -> Prediction:
        """Predict `inputs` (n, *sample_shape): float32, or uint8 from pictures, which are scaled as in training.

        `by`: what `served` has returned, where inputs were made for it; by default what is served now. Raises
        `DataError` for inputs that do not fit the model, `NothingServedError` (a `ModelError`) when there is no model,
        `ModelError` when it fails, or answers what is no number, and `ResourceError` when memory runs out.
        """
        served = by or self.served()
        samples = served.onnx.checked(inputs)
        begun = time.perf_counter()
        try:
            prediction = _predict(served, samples, batch_size)
        except ReftError as exc:
            too_many = isinstance(exc, ResourceError) and batch_size > BATCH  # at once: the caller's choice
            if self._counts is not None and not too_many:
                self._counts.add_error(served.deployment)
            raise
        if self._counts is not None:
            self._counts.add(served.deployment, prediction, duration_s=time.perf_counter() - begun)
        return prediction

    def served(self) -> ServedModel:
        """What predicts now. Raises `NothingServedError`."""
        if self._served is None and self._place.slots is not None:
            self._follow(self._place.slots)  # the first model is waited for: there is none to go on with
        self.refresh()
        served = self._served
        if served is None:
            raise NothingServedError(self._told or self._why_nothing())
        return served

    def refresh(self) -> None:
        """Begin to load what was switched to meanwhile, if anything; returns at once."""
        slots = self._place.slots
        if slots is None or not self._is_stale(slots) or self._loading.locked():
            return
        threading.Thread(target=self._follow, args=(slots,), name="reft-edge-load", daemon=True).start()

    def close(self) -> None:
        """Write what was counted last. The predictor may not be used any more."""
        if self._counts is not None:
            self._counts.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _why_nothing(self) -> str:
        obstacle = None if self._place.slots is None else self._place.slots.obstacle()
        if obstacle is not None:
            return f"{obstacle}; be the user that the agent runs as"
        return f"{self._place.path} serves no model yet; {_ADVICE}"

    def _is_stale(self, slots: Slots) -> bool:
        return slots.stamp() != self._stamp or 0 < self._retry_at <= time.monotonic()

    def _follow(self, slots: Slots) -> None:
        """Load what the slots serve, unless it is here already."""
        with self._loading:
            while self._is_stale(slots):
                stamp = slots.stamp()
                self._retry_at = 0.0
                chosen = slots.current()
                problem = self._take(chosen, slots)
                if slots.stamp() != stamp:
                    continue  # switched meanwhile: what was said may be about files that have gone
                self._stamp = stamp
                if isinstance(problem, (ResourceError, OSError)):
                    self._retry_at = time.monotonic() + RETRY_S
                self._tell(chosen, problem)

    def _take(self, chosen: InstalledModel | None, slots: Slots) -> Exception | None:
        """Serve what the slots name; otherwise why not, and what is here goes on, or else what was served before."""
        if chosen is None:
            if slots.stamp() is not None:  # else the spool is out of reach, and nobody has undone anything
                self._served = None
            return None
        if _is_same(chosen, self._served):
            return None
        problem = self._load(chosen)
        before = slots.previous()
        if self._served is None and before is not None:
            self._load(before)
        return problem

    def _load(self, installed: InstalledModel) -> Exception | None:
        """Serve it; otherwise why not, and all is as before."""
        try:
            self._served = _load_slot(installed, self._threads)
        except (OSError, ReftError) as exc:
            return exc
        return None

    def _tell(self, chosen: InstalledModel | None, problem: Exception | None) -> None:
        """Once, and again when it is another one."""
        what = f"{problem.filename} cannot be read: {problem.strerror}" if isinstance(problem, OSError) else problem
        text = "" if problem is None else f"{self._place.path}: {what}"
        if text and text != self._told:
            goes_on = "nothing is served" if self._served is None else f"{self._served.version} is served"
            logger.warning("%s; %s", text, goes_on)
            if chosen is not None and self._counts is not None and not isinstance(problem, OSError):
                self._counts.add_error(chosen.slot.deployment)
        self._told = text


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where models come from."""

    path: Path
    """As it was named."""
    slots: Slots | None = None
    """None: `path` is the model itself."""
    report: bool = False
    """Whether the device's owner allows that more than errors is counted."""


_NEVER = object()
"""No stamp is equal to it."""

_ADVICE = "deploy one (reft-edge deploy), or name an .onnx file"


def _find(source: Path) -> _Place:
    if source.is_dir():
        try:
            names = {path.name for path in source.iterdir()}
        except OSError as exc:
            raise ConfigError(f"{source} cannot be read: {exc.strerror}; be the user that the agent runs as") from exc
        if not names & {SERVING, "state.json", "blobs"}:
            raise ConfigError(f"{source} is no agent's spool; name an agent.toml, a spool or an .onnx file")
        return _Place(path=source, slots=Slots(source / SERVING))
    if source.suffix == ".toml":
        settings = AgentSettings.read(source)
        serving = source.resolve().parent / settings.spool / SERVING
        return _Place(path=source, slots=Slots(serving), report=settings.serving.report)
    if not source.is_file():
        raise ConfigError(f"{source}: no such file; name an agent.toml, an agent's spool or an .onnx file")
    return _Place(path=source)


def _load_file(path: Path, threads: int) -> ServedModel:
    onnx = OnnxModel(path, threads=threads)
    return ServedModel(version=onnx.metadata.get("run") or path.stem, model=path.stem, onnx=onnx)


def _load_slot(installed: InstalledModel, threads: int) -> ServedModel:
    """Raises `BundleError` when the file is not what was installed, and what `OnnxModel` raises."""
    slot = installed.slot
    # By its descriptor, so that what is loaded is what was hashed, whatever is installed meanwhile.
    with installed.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != slot.sha256:
            raise BundleError(
                f"version {slot.version} is damaged on disk: {installed.path} is not what its SHA-256 says"
            )
        path = Path(f"/proc/self/fd/{file.fileno()}")
        onnx = OnnxModel(path, threads=threads, classes=slot.classes, called=f"{slot.version} ({slot.model})")
    return ServedModel(
        version=slot.version,
        model=slot.model,
        deployment=slot.deployment,
        precision=slot.precision,
        sha256=slot.sha256,
        onnx=onnx,
    )


def _is_same(installed: InstalledModel, served: ServedModel | None) -> bool:
    slot = installed.slot
    return served is not None and (served.deployment, served.sha256) == (slot.deployment, slot.sha256)


def _predict(served: ServedModel, samples: Array, batch_size: int) -> Prediction:
    """Raises `ModelError` and `ResourceError`."""
    onnx = served.onnx
    outputs = onnx.run(samples, batch_size=batch_size)
    answers = onnx.answers(outputs)
    bad = without_answer(answers)
    if len(bad):
        which = f"sample {int(bad[0])} ({len(bad)} of {len(outputs)} samples)"
        raise ModelError(f"version {served.version} ({served.model}) answers {which} with what is no number")
    return Prediction(
        version=served.version,
        model=served.model,
        outputs=outputs,
        probabilities=answers if onnx.is_classifier else None,
        classes=onnx.classes,
    )
