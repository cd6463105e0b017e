"""From torch modules to bundles: the training-step compiler, pruning and export.

The names below load on first use, so that importing a module of this package (for example by the layers' test) does not
load torch for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_edge.bundle.manifest import SGD, Adam, CrossEntropy, MeanSquaredError

if TYPE_CHECKING:
    from reft_edge.compile.compiler import compile_bundle
    from reft_edge.compile.export import export_onnx

__all__ = ["SGD", "Adam", "CrossEntropy", "MeanSquaredError", "compile_bundle", "export_onnx"]


def __getattr__(name: str) -> object:
    if name == "compile_bundle":
        from reft_edge.compile.compiler import compile_bundle

        return compile_bundle
    if name == "export_onnx":
        from reft_edge.compile.export import export_onnx

        return export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
