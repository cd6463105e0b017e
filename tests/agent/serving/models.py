"""ONNX files that know the test data's three brightnesses, or do not; made in milliseconds."""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from reft_edge.agent.serving.slots import InstalledModel
from reft_edge.bundle.container import compress
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.deployment import Deploy, ModelFile, Precision

ROUND = 100_000
"""Additions in a round of work that is only there to take its time."""


def brightness_model(
    *, wrong: float = 0.0, scale: float = 1.0, shape: tuple[int, ...] = (1, 6, 6), n_outputs: int = 3, rounds: int = 0
) -> bytes:
    """Scores -(brightness * scale - class)^2 for each class, but for what is the same for all.

    `wrong` is added to the score of class 0: from 1 on some of class 1 are taken for it, with 10 everything is. With
    one output it is the brightness. `rounds`: of work before each answer.
    """
    numbers = np.arange(n_outputs) if n_outputs > 1 else np.array([0.5])
    weights = np.tile(2 * scale * numbers / prod(shape), (prod(shape), 1)).astype(np.float32)
    bias = (-(numbers**2) * (n_outputs > 1)).astype(np.float32)
    bias[0] += wrong
    nodes = [
        helper.make_node("Flatten", ["inputs"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["scores"]),
        helper.make_node("Add", ["scores", "nothing"], ["outputs"]),
    ]
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")]
    if rounds:
        constants.append(numpy_helper.from_array(np.array(rounds), "n_rounds"))
        constants.append(numpy_helper.from_array(np.zeros(ROUND, np.float32), "zeros"))
        nodes[:0] = [
            helper.make_node("Loop", ["n_rounds", "", "zeros"], ["spent"], body=_round()),
            helper.make_node("ReduceMax", ["spent"], ["nothing"], keepdims=0),
        ]
    else:
        constants.append(numpy_helper.from_array(np.float32(0), "nothing"))
    return _file(nodes, constants, shape, n_outputs)


def hungry_model(memory_bytes: int, *, shape: tuple[int, ...] = (1, 6, 6)) -> bytes:
    """One that takes this much memory for each sample."""
    length = np.array([memory_bytes // 4])
    nodes = [
        helper.make_node("ConstantOfShape", ["length"], ["filled"]),
        helper.make_node("Flatten", ["inputs"], ["flat"]),
        helper.make_node("ReduceMax", ["flat"], ["highest"], keepdims=0),
        helper.make_node("Add", ["filled", "highest"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["nothing"], keepdims=0),
        helper.make_node("Gemm", ["flat", "weights"], ["scores"]),
        helper.make_node("Add", ["scores", "nothing"], ["outputs"]),
    ]
    weights = np.zeros((prod(shape), 3), np.float32)
    constants = [numpy_helper.from_array(length, "length"), numpy_helper.from_array(weights, "weights")]
    return _file(nodes, constants, shape, 3)


def _round() -> Any:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROUND]) for name in ("values", "doubled")]
    flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go_on", "still")]
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [])
    nodes = [
        helper.make_node("Identity", ["go_on"], ["still"]),
        helper.make_node("Add", ["values", "values"], ["doubled"]),
    ]
    return helper.make_graph(nodes, "round", [number, flags[0], values[0]], [flags[1], values[1]])


def _file(nodes: list[Any], constants: list[Any], shape: tuple[int, ...], n_outputs: int) -> bytes:
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["n", n_outputs])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def deployment(
    store: BlobStore, name: str, *models: bytes, precisions: tuple[Precision, ...] = ("float32", "int8"), **other: Any
) -> Deploy:
    """Put the files into `store` and make an offer of them."""
    files = tuple(
        ModelFile(blob=store.put(compress(data)), size_bytes=len(data), precision=precision)
        for data, precision in zip(models, precisions, strict=False)
    )
    return Deploy(deployment=name, **{"version": f"version-{name}", "model": "global", "files": files, **other})


def is_model(installed: InstalledModel | None, data: bytes) -> bool:
    """Whether it is this one, byte for byte."""
    return installed is not None and installed.path.read_bytes() == data


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def spoil(path: Path) -> None:
    """Change a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
