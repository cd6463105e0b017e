"""How each aten operator becomes ONNX: importing this package registers all rules."""

from __future__ import annotations

from reft_edge.compile.rules import (
    convolution,
    creation,
    indexing,
    matmul,
    normalization,
    pointwise,
    pooling,
    reduction,
    shapes,
)

__all__ = [
    "convolution",
    "creation",
    "indexing",
    "matmul",
    "normalization",
    "pointwise",
    "pooling",
    "reduction",
    "shapes",
]
