"""A bundle in memory and in a directory: manifest, training graph, inference graph and weights.

The three blobs are kept as they travel (compressed), because they are named by the hash of those bytes; a caller
decompresses what it needs. `Bundle.open` checks sizes and hashes, so a damaged or foreign file is an error here and not
a wrong result later. Signatures are the wire's business.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from reft_edge.bundle.container import container_limit, decompress, pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import MAX_MANIFEST_BYTES, BlobRef, Manifest, TensorSpec
from reft_edge.errors import BundleError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from reft_edge.types import Array, Tensors

MANIFEST_FILE = "manifest.json"
TRAINING_FILE = "training.onnx.zst"
INFERENCE_FILE = "inference.onnx.zst"
WEIGHTS_FILE = "weights.safetensors.zst"

MAX_GRAPH_BYTES = 64 * 2**20
"""64 MiB decompressed. A graph without weights has some hundred bytes an operator; VGG16's step has about 200 kB."""


def blob_ref(data: bytes) -> BlobRef:
    """The name of a blob: hash and size of its bytes."""
    return BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def weights_limit(manifest: Manifest) -> int:
    """`max_bytes` for `unpack_tensors` on the weights that a manifest describes."""
    itemsize = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
    return container_limit(sum(spec.n_elements * itemsize[spec.dtype] for spec in manifest.tensors))


def check_tensors(tensors: Tensors, specs: Iterable[TensorSpec]) -> None:
    """Raise `BundleError` unless `tensors` are exactly what `specs` say: names, shapes and dtypes."""
    expected = {spec.name: spec for spec in specs}
    if odd := sorted(expected.keys() ^ tensors.keys()):
        side = "lacks" if odd[0] in expected else "has unknown"
        raise BundleError(f"weights: the container {side} tensor {odd[0]!r} ({len(odd)} names differ)")
    for name, spec in expected.items():
        found = tensors[name]
        if found.shape != spec.shape or found.dtype.name != spec.dtype:
            raise BundleError(
                f"weights: {name!r} is {found.dtype.name} {found.shape}, expected {spec.dtype} {spec.shape}"
            )


def graph_bytes(blob: bytes) -> bytes:
    """The ONNX file inside a graph blob. Raises `BundleError`."""
    return decompress(blob, max_bytes=MAX_GRAPH_BYTES)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """One compiled variant. `training_graph`, `inference_graph` and `weights` are compressed blobs."""

    manifest: Manifest
    training_graph: bytes
    inference_graph: bytes
    weights: bytes

    def save(self, directory: Path | str) -> Path:
        """Write the four files into `directory`, which is created; returns it. Raises `ResourceError`."""
        from pathlib import Path

        target = Path(directory)
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / TRAINING_FILE).write_bytes(self.training_graph)
            (target / INFERENCE_FILE).write_bytes(self.inference_graph)
            (target / WEIGHTS_FILE).write_bytes(self.weights)
            (target / MANIFEST_FILE).write_bytes(self.manifest.to_json())
        except OSError as exc:
            raise ResourceError(f"the bundle {target} cannot be written: {exc.strerror or exc}") from exc
        return target

    @classmethod
    def open(cls, directory: Path | str) -> Bundle:
        """Read and check a directory that `save` wrote. Raises `BundleError`."""
        from pathlib import Path

        source = Path(directory)
        manifest = Manifest.from_json(_read(source / MANIFEST_FILE, MAX_MANIFEST_BYTES))
        return cls(
            manifest=manifest,
            training_graph=_read_blob(source / TRAINING_FILE, manifest.training_graph),
            inference_graph=_read_blob(source / INFERENCE_FILE, manifest.inference_graph),
            weights=_read_blob(source / WEIGHTS_FILE, manifest.weights),
        )

    def tensors(self) -> dict[str, Array]:
        """The weights, checked against the manifest. Raises `BundleError`."""
        tensors, _ = unpack_tensors(self.weights, max_bytes=weights_limit(self.manifest))
        check_tensors(tensors, self.manifest.tensors)
        return tensors

    def with_weights(self, tensors: Tensors) -> Bundle:
        """The same graphs with other weights. Raises `BundleError` when names, shapes or dtypes differ."""
        check_tensors(tensors, self.manifest.tensors)
        weights = pack_tensors(tensors)
        return replace(
            self, manifest=msgspec.structs.replace(self.manifest, weights=blob_ref(weights)), weights=weights
        )


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a device or a pipe has no size, and no end
            raise BundleError(f"{path} is not a file; a bundle is a directory of four files")
        size = path.stat().st_size
        if size > max_bytes:
            raise BundleError(f"{path} has {size} bytes; at most {max_bytes} are accepted")
        return path.read_bytes()
    except OSError as exc:
        raise BundleError(
            f"{path} cannot be read: {exc.strerror or exc}; a bundle is a directory of four files"
        ) from exc


def _read_blob(path: Path, expected: BlobRef) -> bytes:
    data = _read(path, expected.size_bytes)
    if blob_ref(data) != expected:
        raise BundleError(
            f"{path} is not what the manifest names (SHA-256 {expected.sha256[:12]}…); copy the bundle again"
        )
    return data
