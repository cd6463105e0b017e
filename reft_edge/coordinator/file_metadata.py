"""What an exported ONNX file says about itself, so that it can be used years later without the federation's settings.

Entries are ONNX `metadata_props`, which any runtime hands out (onnxruntime: `session.get_modelmeta()`). For pictures
they are those that ONNX defines (docs/MetadataProps.md in onnx/onnx). There is no date in them, and so the same run
gives the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

import reft_edge
from reft_edge.bundle.manifest import CrossEntropy
from reft_edge.errors import ModelError, ResourceError

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import Manifest
    from reft_edge.coordinator.evaluation import Metrics

_PIXEL_FORMATS = {1: "Gray8", 3: "Rgb8"}
"""By channels; of other pictures ONNX knows no format that data folders here have."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a file comes from."""

    federation: str = ""
    run: str = ""
    classes: tuple[str, ...] = ()
    """In the order of the outputs; empty where labels have no names."""


def describe(origin: Origin, manifest: Manifest, *, pictures: bool, metrics: Metrics | None) -> dict[str, str]:
    """The entries of one file. `pictures`: inputs were bytes, and the model takes them divided by 255.

    `metrics`: of the file itself on the federation's test data.
    """
    task = "classification" if isinstance(manifest.loss, CrossEntropy) else "regression"
    entries = {"model": manifest.model, "input_shape": json.dumps(manifest.input.shape), "task": task}
    for name in ("federation", "run"):
        if value := getattr(origin, name):
            entries[name] = value
    if origin.classes:
        entries["classes"] = json.dumps(origin.classes, ensure_ascii=False)
    if pictures:
        entries["Image.NominalPixelRange"] = "Normalized_0_1"
        if (pixels := _PIXEL_FORMATS.get(manifest.input.shape[0])) is not None:
            entries["Image.BitmapPixelFormat"] = pixels
    if metrics is not None:
        measured = {"accuracy": metrics.accuracy, "mse": metrics.mse, "loss": metrics.loss}
        entries |= {f"test_{name}": f"{value:.6g}" for name, value in measured.items() if value is not None}
    return entries


def write_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Replace what the ONNX file at `path` says about itself. Raises `ModelError` or `ResourceError`.

    Needs the file's size in memory twice.
    """
    try:
        model = onnx.load_model(path)
        model.producer_name, model.producer_version = "reft-edge", reft_edge.__version__
        del model.metadata_props[:]
        for key in sorted(entries):
            model.metadata_props.add(key=key, value=entries[key])
        partial = path.with_name(path.name + ".tmp")
        partial.write_bytes(model.SerializeToString(deterministic=True))
        partial.replace(path)
    except OSError as exc:
        raise ResourceError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    except ValueError as exc:  # protobuf stops at 2 GiB
        raise ModelError(f"{path.name}: cannot be written with what it is about: {exc}") from exc
