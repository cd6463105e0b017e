"""One side of the comparison, in a process of its own so that peak memory is its own.

`python -m reft_edge.simulation.step.child KIND ...` makes one thing that can be run, then answers each number on
standard input: it runs that often and prints a line of JSON, seconds and processor seconds for each run and the peak of
the resident memory. Each kind loads what it needs and nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from reft_edge.types import Array

LEARNING_RATE = 0.01
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4

GEMM_SIZE = 768
"""Rows, columns and inner size of the products that tell the peak: three matrices of 2.3 MB."""

PRUNED_VGG16 = (48, 48, "pool", 96, 96, "pool", 64, 64, 64, "pool", 64, 64, 64, "pool", 64, 64, 64, "pool")
"""Widths for about the paper's pruned VGG16: 470,000 parameters, 0.07 GMACs."""


def build(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """The model, one sample's shape and the number of classes."""
    import torch

    from reft_edge.models.registry import ZOO, build_model
    from reft_edge.models.vgg import VGG

    torch.manual_seed(0)
    if name == "vgg16_pruned":
        return VGG((3, 32, 32), 10, PRUNED_VGG16, hidden=(64, 64)), (3, 32, 32), 10  # type: ignore[arg-type]
    entry = ZOO[name]
    module = build_model(name, input_shape=entry.input_shape, n_outputs=entry.n_outputs)
    return module, entry.input_shape, entry.n_outputs


def compile_into(directory: str, name: str) -> None:
    """Write the model's bundle."""
    from reft_edge.compile import SGD, compile_bundle

    module, shape, _ = build(name)
    compile_bundle(module, shape, optimizer=SGD(momentum=MOMENTUM, weight_decay=WEIGHT_DECAY), name=name).save(
        directory
    )


def _batch(shape: tuple[int, ...], n_classes: int, n_batch: int) -> tuple[Array, Array]:
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((n_batch, *shape), np.float32), rng.integers(0, n_classes, n_batch)


def our_step(directory: str, n_batch: int, threads: int, spin: bool) -> Callable[[], object]:
    """The product's trainer."""
    from reft_edge.agent.trainer import Trainer

    trainer = Trainer(directory, threads=threads, spin=spin)
    inputs, targets = _batch(trainer.manifest.input.shape, trainer.manifest.output.shape[0], n_batch)
    return lambda: trainer.step(inputs, targets, LEARNING_RATE)


def torch_step(name: str, n_batch: int, threads: int) -> Callable[[], object]:
    """The same step, eager."""
    import torch

    torch.set_num_threads(threads)
    module, shape, n_classes = build(name)
    module.train()
    solver = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    inputs, targets = (torch.from_numpy(array) for array in _batch(shape, n_classes, n_batch))

    def step() -> None:
        solver.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), targets).backward()  # type: ignore[no-untyped-call]
        solver.step()

    return step


def onnxruntime_product(threads: int) -> Callable[[], object]:
    """A product of two large matrices through onnxruntime."""
    import numpy as np
    from onnx import TensorProto, helper

    from reft_edge.bundle.container import compress
    from reft_edge.bundle.inference import open_session

    names = ("left", "right", "product")
    left, right, product = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [GEMM_SIZE] * 2) for n in names)
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    graph = helper.make_graph([node], "product", [left, right], [product])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(compress(model.SerializeToString()), threads=threads)
    binding = session.io_binding()
    for name in ("left", "right"):
        binding.bind_cpu_input(name, np.ones((GEMM_SIZE, GEMM_SIZE), np.float32))
    binding.bind_output("product")
    return lambda: session.run_with_iobinding(binding)


def numpy_product() -> Callable[[], object]:
    """The same through numpy's BLAS, whose number of threads the environment says."""
    import numpy as np

    left, right = (np.ones((GEMM_SIZE, GEMM_SIZE), np.float32) for _ in range(2))
    return lambda: left @ right


def _peak_bytes() -> int:
    """VmHWM and not getrusage: the latter remembers the parent's size from before exec."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(row.split()[1] for row in rows if row.startswith("VmHWM")))


def _serve(run: Callable[[], object]) -> None:
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start, cpu = time.perf_counter(), time.process_time()
            run()
            times.append((time.perf_counter() - start, time.process_time() - cpu))
        print(json.dumps({"times": times, "peak_bytes": _peak_bytes()}), flush=True)


def _make(kind: str, arguments: list[Any]) -> Callable[[], object]:
    if kind == "ours":
        directory, n_batch, threads, spin = arguments
        return our_step(directory, int(n_batch), int(threads), spin == "spin")
    if kind == "torch":
        name, n_batch, threads = arguments
        return torch_step(name, int(n_batch), int(threads))
    if kind == "onnxruntime-product":
        return onnxruntime_product(int(arguments[0]))
    return numpy_product()


def main(kind: str, *arguments: str) -> None:
    if kind == "compile":
        compile_into(*arguments)
    else:
        _serve(_make(kind, list(arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
