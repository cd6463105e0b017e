"""Train a bundle on this device: one onnxruntime session that takes parameters, optimizer state and a batch, and
returns them updated.

State stays in two sets of onnxruntime buffers that exchange roles after each step, so nothing is copied between steps.
The inference session is opened when it is first needed: a device that only trains does not pay for it.

Only numpy and onnxruntime are needed; there is no torch here, and no file is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from reft_edge.bundle.bundle import Bundle, check_tensors
from reft_edge.bundle.inference import ORT_ERRORS, Predictor, first_line, open_session
from reft_edge.bundle.manifest import CrossEntropy, Manifest
from reft_edge.errors import BundleError, DataError, ResourceError

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors

_UPDATED = "updated/"
"""Prefix of the outputs that replace inputs."""

_BATCH_INPUTS = frozenset({"inputs", "targets", "learning_rate", "seed"})
"""Inputs of the training graph that are not state."""


class Trainer:
    """A bundle in training.

    `bundle` is a directory or a `Bundle`. `threads` is the number of cores to use, `spin` whether they wait for each
    other by spinning; `seed` makes dropout reproducible: step `k` draws from (seed, k).
    """

    def __init__(self, bundle: Bundle | Path | str, *, threads: int = 2, spin: bool = False, seed: int = 0) -> None:
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self._start(
            opened.manifest, opened.training_graph, opened.inference_graph, opened.tensors(), threads, spin, seed
        )

    @classmethod
    def from_parts(
        cls,
        manifest: Manifest,
        training_graph: bytes,
        inference_graph: bytes,
        weights: Tensors,
        *,
        threads: int = 2,
        spin: bool = False,
        seed: int = 0,
    ) -> Trainer:
        """A trainer from blobs that lie apart, with weights that may be newer than the bundle's.

        Raises `BundleError` when they do not fit the manifest.
        """
        check_tensors(weights, manifest.tensors)
        trainer = cls.__new__(cls)
        trainer._start(manifest, training_graph, inference_graph, weights, threads, spin, seed)
        return trainer

    def _start(
        self,
        manifest: Manifest,
        training_graph: bytes,
        inference_graph: bytes,
        weights: Tensors,
        threads: int,
        spin: bool,
        seed: int,
    ) -> None:
        self.manifest = manifest
        self._threads = threads
        self._seed = seed
        self._n_steps = 0
        self._inference_graph = inference_graph
        self._predictor: Predictor | None = None
        self._session = open_session(training_graph, threads=threads, spin=spin)
        self._shapes = {
            value.name: _shape(value) for value in self._session.get_inputs() if value.name not in _BATCH_INPUTS
        }
        self._check_graph()
        self._constants: dict[str, ort.OrtValue] = {}
        self._state: dict[str, ort.OrtValue] = {}
        self._spare: dict[str, ort.OrtValue] = {}
        outputs = {value.name for value in self._session.get_outputs()}
        self._updated = [name for name in self._shapes if _UPDATED + name in outputs]
        self.load_state(weights)
        self.reset_optimizer()

    def _check_graph(self) -> None:
        """The graph must be the manifest's: same tensors, same shapes."""
        for spec in self.manifest.tensors:
            if spec.name in self._shapes and self._shapes[spec.name] != spec.shape:
                raise BundleError(
                    f"training graph has {spec.name!r} as {self._shapes[spec.name]}, the manifest as {spec.shape}"
                )

    def load_state(self, tensors: Tensors) -> None:
        """Replace all weights and buffers; optimizer state stays. Raises `BundleError` when they do not fit."""
        check_tensors(tensors, self.manifest.tensors)
        for name, array in tensors.items():
            # A copy: an OrtValue on the CPU is a view, and the second step writes into what the first one read.
            value = ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C"))
            if name in self._updated:
                self._state[name] = value
            else:
                self._constants[name] = value

    def reset_optimizer(self) -> None:
        """Start the optimizer anew: all its state becomes zero."""
        known = {spec.name for spec in self.manifest.tensors}
        for name, shape in self._shapes.items():
            if name not in known:
                self._state[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))

    def restart(self, tensors: Tensors, *, seed: int) -> None:
        """Begin as a new trainer with these weights would, without opening a session again."""
        self.load_state(tensors)
        self.reset_optimizer()
        self._seed = seed
        self._n_steps = 0

    def step(self, inputs: Array, targets: Array, learning_rate: float = 0.05) -> float:
        """One optimizer step on a batch; returns the batch's loss before it.

        `inputs`: (n, *input_shape); `targets`: (n,) class indices, or float32 shaped as the output. Raises `DataError`
        for a batch that does not fit, and `ResourceError` when memory runs out; weights are then as before the step.
        """
        samples, wanted = self._check_batch(inputs, targets)
        binding = self._session.io_binding()
        binding.bind_cpu_input("inputs", samples)
        binding.bind_cpu_input("targets", wanted)
        binding.bind_cpu_input("learning_rate", np.array(learning_rate, np.float32))
        if self.manifest.uses_seed:
            binding.bind_cpu_input("seed", np.array(self._step_seed(), np.int64))
        for name in self._shapes:
            binding.bind_ortvalue_input(name, self._state[name] if name in self._state else self._constants[name])
        binding.bind_output("loss")
        for name in self._updated:
            if name not in self._spare:
                old = self._state[name]
                self._spare[name] = ort.OrtValue.ortvalue_from_shape_and_type(old.shape(), _dtype(old), "cpu")
            binding.bind_ortvalue_output(_UPDATED + name, self._spare[name])
        try:
            self._session.run_with_iobinding(binding)
        except MemoryError as exc:
            raise ResourceError(
                f"not enough memory for a batch of {len(samples)}; use a smaller batch or model"
            ) from exc
        except ORT_ERRORS as exc:
            raise _failure(exc, len(samples)) from exc
        for name in self._updated:
            self._state[name], self._spare[name] = self._spare[name], self._state[name]
        self._n_steps += 1
        return float(binding.get_outputs()[0].numpy())

    def predict(self, inputs: Array, *, batch_size: int = 128) -> FloatArray:
        """Outputs of the model in evaluation mode: float32 (n, *output_shape)."""
        samples = self._check_samples(inputs)
        if self._predictor is None:
            self._predictor = Predictor(self._inference_graph, threads=self._threads)
        return self._predictor.predict(self.state(), samples, batch_size=batch_size)

    def evaluate(self, inputs: Array, targets: Array, *, batch_size: int = 128) -> tuple[float, float]:
        """Mean loss (without label smoothing) and metric on held-out samples.

        The metric is accuracy for cross entropy, and the mean squared error again for regression.
        """
        samples, wanted = self._check_batch(inputs, targets)
        outputs = self.predict(samples, batch_size=batch_size).astype(np.float64)
        if not isinstance(self.manifest.loss, CrossEntropy):
            error = float(np.mean((outputs - wanted) ** 2))
            return error, error
        shifted = outputs - outputs.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        loss = -float(np.mean(log_p[np.arange(len(wanted)), wanted]))
        return loss, float(np.mean(outputs.argmax(axis=1) == wanted))

    def state(self) -> dict[str, Array]:
        """Copies of all weights and buffers, under the names of the module's `state_dict()`."""
        values = {**self._constants, **self._state}
        return {spec.name: values[spec.name].numpy().copy() for spec in self.manifest.tensors}

    def _step_seed(self) -> int:
        """A number for this step: the run's seed and the step's count, far apart."""
        return (self._seed * 1_000_003 + self._n_steps) & 0x7FFFFFFF

    def _check_samples(self, inputs: Array) -> Array:
        spec = self.manifest.input
        samples = np.asarray(inputs)
        if samples.shape[1:] != spec.shape or samples.ndim != len(spec.shape) + 1 or len(samples) == 0:
            raise DataError(
                f"inputs have shape {samples.shape}; the model takes (n, {', '.join(map(str, spec.shape))})"
            )
        return _converted("inputs", samples, spec.dtype)

    def _check_batch(self, inputs: Array, targets: Array) -> tuple[Array, Array]:
        samples = self._check_samples(inputs)
        spec = self.manifest.target
        wanted = np.asarray(targets)
        if wanted.shape != (len(samples), *spec.shape):
            raise DataError(f"targets have shape {wanted.shape}; expected {(len(samples), *spec.shape)}")
        wanted = _converted("targets", wanted, spec.dtype)
        if isinstance(self.manifest.loss, CrossEntropy):
            n_classes = self.manifest.output.shape[0]
            if wanted.min() < 0 or wanted.max() >= n_classes:
                raise DataError(
                    f"targets reach from {wanted.min()} to {wanted.max()}; the model has classes 0 to {n_classes - 1}"
                )
        return samples, wanted


def _converted(name: str, array: Array, dtype: str) -> Array:
    """`array` contiguous and as `dtype`. Raises `DataError` where that loses something, and for NaN and infinity."""
    if array.dtype.name != dtype:
        number_kinds = "iu" if dtype.startswith("int") else "iuf"
        if array.dtype.kind not in number_kinds:
            raise DataError(f"{name} are {array.dtype.name}; the model takes {dtype}")
        array = array.astype(dtype)
    if dtype == "float32" and not np.isfinite(array).all():
        raise DataError(f"{name} have NaN or infinite entries; clean the data")
    return np.ascontiguousarray(array)


def _shape(value: ort.NodeArg) -> tuple[int, ...]:
    if any(not isinstance(size, int) for size in value.shape):
        raise BundleError(f"training graph's input {value.name!r} has a free axis {value.shape}")
    return tuple(value.shape)


def _dtype(value: ort.OrtValue) -> type[np.generic]:
    names = {
        "tensor(float)": np.float32,
        "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
        "tensor(bool)": np.bool_,
    }
    return names[value.data_type()]


def _failure(error: Exception, n_samples: int) -> ResourceError | BundleError:
    text = first_line(error)
    if "alloc" in text.lower() or "memory" in text.lower():
        return ResourceError(f"not enough memory for a batch of {n_samples}; use a smaller batch or model ({text})")
    return BundleError(f"the training graph failed on a batch of {n_samples}: {text}")
