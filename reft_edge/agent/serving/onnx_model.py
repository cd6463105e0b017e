"""An ONNX file ready to predict: what it takes, what it gives, and what it says about itself.

Files that reft-edge exports say all that is needed (their metadata are written by `coordinator.file_metadata`). Any
other ONNX file works too if it has one input whose first axis is the samples and whose other axes are fixed; its first
output counts. What it does not say is decided as follows. uint8 samples are pictures and are divided by 255, as
everywhere in reft-edge, unless `Image.NominalPixelRange` says otherwise. Two or more numbers a sample are scores of
classes, unless `task` says `regression`. Whether scores are probabilities already is seen by running the file, which
shows, too, that it runs.

The only file of the serving side that knows onnxruntime.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnxruntime as ort

from reft_edge.bundle.inference import ORT_ERRORS, first_line, session_options
from reft_edge.data.dataset import scale
from reft_edge.errors import DataError, ModelError, ResourceError

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, IntArray

Entry = TypeVar("Entry", int, str)

BATCH = 32
"""Samples that are computed at once: more need more memory, and hardly go faster on a small board."""

_ERRORS: tuple[type[Exception], ...] = (MemoryError, *ORT_ERRORS)

_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}

_PIXELS: Mapping[str, Callable[[Array], Array]] = {
    "Normalized_0_1": scale,
    "Normalized_1_1": lambda pixels: pixels * np.float32(2 / 255) - np.float32(1),
    "NominalRange_0_255": lambda pixels: pixels.astype(np.float32),
}
"""What the values of `Image.NominalPixelRange` (docs/MetadataProps.md in onnx/onnx) make of bytes."""


_ORT_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (?:Load model from .*? failed: ?)?")
_ORT_NODE = re.compile(r"In Node, \(\"(?P<name>.*?)\", (?P<operator>\w+), .*?\) -> \(.*?\) ?, (?:Error )?")
_ORT_PLACE = re.compile(r"Status Message: \S+\.(?:h|cc|cpp):\d+ .*?(?<=\)) (?=\S)")


class OnnxModel:
    """The ONNX file at `path`, run on `threads` cores.

    `classes`: names in the order of the outputs; by default those that the file has. `called`: what errors call it.
    Raises `ModelError` for a file that cannot be used, `ResourceError` when memory runs out. Any number of threads may
    use it at a time.
    """

    def __init__(self, path: Path, *, threads: int = 1, classes: Sequence[str] = (), called: str = "") -> None:
        self._called = called or path.name
        self._session = self._open(path, threads)
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise self._unusable(f"it has {len(inputs)} inputs; a model that is served has one")
        (self._input,) = inputs
        self._output = self._session.get_outputs()[0].name
        self.dtype = np.dtype(self._known_dtype())
        self.sample_shape, self._fixed_batch = self._input_shape()
        self._pixels = self._pixel_scale()
        probe = self.run(np.zeros((1, *self.sample_shape), self.dtype))
        self.output_shape: tuple[int, ...] = probe.shape[1:]
        """Of one sample."""
        self.classes = tuple(classes) or self._own_classes()
        """Names in the order of the outputs; empty where they have none."""
        self.is_classifier = self._is_classifier()
        """Whether the outputs of a sample are scores of classes."""
        self._gives_probabilities = self.is_classifier and _are_probabilities(probe) and self._still_probabilities()

    @property
    def takes_pictures(self) -> bool:
        """Whether a sample is (channels, height, width) of a picture, as far as its shape tells."""
        return len(self.sample_shape) == 3 and self.sample_shape[0] in (1, 3, 4)

    def run(self, inputs: Array, *, batch_size: int = BATCH) -> FloatArray:
        """Outputs float32 (n, *output_shape) of `inputs` (n, *sample_shape), which are as `checked` gives them."""
        size = self._fixed_batch or batch_size
        return np.concatenate([self._run(inputs[start : start + size]) for start in range(0, len(inputs), size)])

    def checked(self, inputs: object) -> Array:
        """`inputs` (n, *sample_shape) in the model's own dtype, or as uint8, which `run` scales batch by batch.

        Raises `DataError` for what does not fit the model, and for NaN and infinity.
        """
        try:
            samples = np.asarray(inputs)
        except ValueError as exc:  # rows of different lengths
            raise DataError("inputs do not make one array: their rows are of different lengths") from exc
        if samples.shape[1:] != self.sample_shape or samples.ndim == 0 or len(samples) == 0:
            hint = "; put one sample into a list of its own" if samples.shape == self.sample_shape else ""
            raise DataError(f"inputs have shape {samples.shape}; {self.expectation}{hint}")
        if samples.dtype.kind not in "iuf":
            raise DataError(f"inputs are {samples.dtype.name}; {self.expectation}")
        if samples.dtype == self.dtype or self._are_pixels(samples):
            converted = samples
        elif self.dtype.kind in "iu":
            converted = self._whole_numbers(samples)
        else:
            with np.errstate(over="ignore"):
                converted = samples.astype(self.dtype)
        if converted.dtype.kind == "f" and not np.isfinite(converted).all():
            bad = ~np.isfinite(converted).reshape(len(converted), -1).all(axis=1)
            raise DataError(f"inputs of sample {int(bad.argmax())} have NaN or infinite entries; clean the data")
        return converted

    @property
    def expectation(self) -> str:
        """What it takes, for an error."""
        shape = ", ".join(("n", *map(str, self.sample_shape)))
        pictures = " or uint8 from pictures" if self.takes_pictures and self.dtype.kind == "f" else ""
        return f"{self._called} takes ({shape}) {self.dtype.name}{pictures}"

    def answers(self, outputs: FloatArray) -> FloatArray:
        """What `outputs` of `run` say: a classifier's probabilities, or else the numbers themselves.

        All of it must be finite (`without_answer`). Outputs need not be: a score may be minus infinity, which is a
        class that cannot be.
        """
        return self.probabilities(outputs) if self.is_classifier else outputs

    def probabilities(self, outputs: FloatArray) -> FloatArray:
        """(n, n_classes), each row with sum 1. `outputs` as `run` gives them; for classifiers only."""
        if self._gives_probabilities:
            return outputs
        with np.errstate(invalid="ignore"):  # plus infinity: no number, and for the caller to see
            exponents = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        summed: FloatArray = exponents / exponents.sum(axis=1, keepdims=True)
        return summed

    def _open(self, path: Path, threads: int) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(path, session_options(threads=threads), providers=["CPUExecutionProvider"])
        except _ERRORS as exc:
            if _is_about_memory(exc):
                raise ResourceError(f"not enough memory to load {self._called}; use a smaller variant") from exc
            raise self._unusable(_words(exc)) from exc

    def _run(self, samples: Array) -> FloatArray:
        n_samples = len(samples)
        batch = self._pixels(samples) if self._are_pixels(samples) else samples
        if n_samples < self._fixed_batch:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self._fixed_batch - n_samples, axis=0)])
        batch = np.ascontiguousarray(batch, dtype=self.dtype)
        try:
            (outputs,) = self._session.run([self._output], {self._input.name: batch})
        except _ERRORS as exc:
            if _is_about_memory(exc):
                raise ResourceError(f"not enough memory to predict {n_samples} samples at once") from exc
            raise self._unusable(f"it fails on {n_samples} samples: {_words(exc)}") from exc
        if not isinstance(outputs, np.ndarray) or outputs.ndim == 0 or len(outputs) != len(batch):
            raise self._unusable(f"its output {self._output!r} is not one entry for each sample")
        if outputs.dtype.kind not in "iuf":
            raise self._unusable(f"its output {self._output!r} is {outputs.dtype.name}; expected numbers")
        return outputs[:n_samples].astype(np.float32, copy=False)

    def _are_pixels(self, samples: Array) -> bool:
        """Whether they are bytes for a model of real numbers."""
        return samples.dtype == np.uint8 and self.dtype.kind == "f"

    def _known_dtype(self) -> type[np.generic]:
        if self._input.type not in _DTYPES:
            raise self._unusable(f"its input {self._input.name!r} is a {self._input.type}; expected numbers")
        return _DTYPES[self._input.type]

    def _input_shape(self) -> tuple[tuple[int, ...], int]:
        """One sample's shape, and how many samples the file takes at once; 0: any number."""
        batch, *axes = self._input.shape or [None]
        if stated := self._stated("input_shape", int):
            axes = list(stated)
        if not self._input.shape or any(not isinstance(size, int) or size < 1 for size in axes):
            raise self._unusable(
                f"its input {self._input.name!r} has shape {self._input.shape}; the first axis must be the samples, "
                "and the others of fixed size"
            )
        return tuple(axes), batch if isinstance(batch, int) else 0

    def _pixel_scale(self) -> Callable[[Array], Array]:
        stated = self.metadata.get("Image.NominalPixelRange", "Normalized_0_1")
        if stated not in _PIXELS:
            raise self._unusable(f"Image.NominalPixelRange is {stated!r}; known are {', '.join(_PIXELS)}")
        return _PIXELS[stated]

    def _own_classes(self) -> tuple[str, ...]:
        return self._stated("classes", str)

    def _stated(self, key: str, kind: type[Entry]) -> tuple[Entry, ...]:
        """A list of `kind` from the file's metadata; () where there is none."""
        try:
            value = json.loads(self.metadata.get(key, "[]"))
        except (ValueError, RecursionError) as exc:
            raise self._unusable(f"its entry {key!r} is not JSON: {exc}") from exc
        if not isinstance(value, list) or any(type(each) is not kind for each in value):
            raise self._unusable(f"its entry {key!r} is not a list of {kind.__name__}")
        return tuple(value)

    def _is_classifier(self) -> bool:
        n_outputs = prod(self.output_shape)
        if self.classes:
            if self.output_shape != (len(self.classes),):
                raise self._unusable(f"{len(self.classes)} classes are named, and a sample's output has {n_outputs}")
            return True
        return len(self.output_shape) == 1 and n_outputs > 1 and self.metadata.get("task") != "regression"

    def _still_probabilities(self) -> bool:
        """Of another sample than zeros, of which a layer gives its bias: that may add up to 1 by chance."""
        if self.dtype.kind != "f":
            return True  # indices: nobody knows how many there are
        sample = np.random.default_rng(0).random((1, *self.sample_shape)).astype(self.dtype)
        return _are_probabilities(self.run(sample))

    def _whole_numbers(self, samples: Array) -> Array:
        with np.errstate(invalid="ignore"):
            converted: Array = samples.astype(self.dtype)
        if not np.array_equal(converted, samples):
            raise DataError(f"inputs have fractions, or numbers out of range; {self.expectation}")
        return converted

    def _unusable(self, reason: str) -> ModelError:
        return ModelError(f"{self._called} cannot be used: {reason}")


def without_answer(answers: FloatArray) -> IntArray:
    """Indices of samples whose answer is no number: NaN or infinite somewhere."""
    return np.flatnonzero(~np.isfinite(answers).reshape(len(answers), -1).all(axis=1))


def _are_probabilities(outputs: FloatArray) -> bool:
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))


def _words(error: Exception) -> str:
    """What onnxruntime says is wrong, without the path of the file, dumps of nodes and places in its own source."""
    text = _ORT_PREFIX.sub("", first_line(error))
    text = _ORT_NODE.sub(lambda found: f"node {found['name']!r} ({found['operator']}): ", text)
    return _ORT_PLACE.sub("", text).strip()


def _is_about_memory(error: Exception) -> bool:
    """onnxruntime tells of it in words only."""
    text = first_line(error).lower()
    return isinstance(error, MemoryError) or "alloc" in text or "out of memory" in text
