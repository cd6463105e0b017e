"""The weights that a task trains from: fetched whole, or put together from those of an earlier task and a delta.

Runs in the worker. What was put together is kept in the spool under the name of the whole blob that it stands for, so
that the next delta may start from it, and a training that is begun again need not compute it again. Nothing here is
trusted to be what its name says: the task tells what the values must be.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.agent.spool import write_atomically
from reft_edge.bundle.bundle import blob_ref
from reft_edge.errors import BundleError, ReftError, ResourceError
from reft_edge.wire.blobs import RESERVED_FREE_BYTES
from reft_edge.wire.codecs import decode_tensors
from reft_edge.wire.deltas import Weights, check_values, rebuild

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import Manifest
    from reft_edge.types import Array
    from reft_edge.wire.blobs import BlobStore
    from reft_edge.wire.messages import Task, WeightsDelta

logger = logging.getLogger(__name__)


class DeltaError(ReftError):
    """Base and delta do not give the task's weights, or are not here. Whole weights help."""


def read_weights(task: Task, manifest: Manifest, *, blobs: BlobStore, rebuilt: Path) -> dict[str, Array]:
    """The task's weights. `rebuilt` is the spool's folder of weights that were put together.

    Raises `DeltaError` when they are not here whole and the delta does not lead to them, `BundleError` when they are
    here and of no use.
    """
    whole = task.weights.blob
    if task.delta is None or blobs.has(whole.sha256):
        return decode_tensors(blobs.read(whole), task.weights.codec, manifest.tensors)
    path = rebuilt / whole.sha256
    try:
        if path.is_file() and (known := _read_known(path, task, task.delta, manifest)) is not None:
            return known
        weights = _put_together(task, task.delta, manifest, blobs=blobs, rebuilt=rebuilt)
    except BundleError as exc:
        raise DeltaError(str(exc)) from exc
    _keep(path, weights.blob, blobs)
    return weights.tensors


def _read_known(path: Path, task: Task, delta: WeightsDelta, manifest: Manifest) -> dict[str, Array] | None:
    """Weights that were put together before; None, and they are removed, when they are damaged."""
    try:
        tensors = decode_tensors(_read(path), task.weights.codec, manifest.tensors)
        check_values(tensors, delta.values)
    except BundleError as exc:
        logger.warning("%s is of no use and is removed: %s", path, exc)
        path.unlink(missing_ok=True)
        return None
    return tensors


def _put_together(task: Task, delta: WeightsDelta, manifest: Manifest, *, blobs: BlobStore, rebuilt: Path) -> Weights:
    """Raises `BundleError`."""
    held = blobs.path(delta.base) if blobs.has(delta.base) else rebuilt / delta.base
    weights = rebuild(
        decode_tensors(_read(held), task.weights.codec, manifest.tensors),
        blobs.read(delta.blob),
        delta_codec=delta.codec,
        weights_codec=task.weights.codec,
        specs=manifest.tensors,
    )
    check_values(weights.tensors, delta.values)
    return weights


def _keep(path: Path, data: bytes, blobs: BlobStore) -> None:
    """Keep weights within the spool's limits. Without them the next ones are fetched whole."""
    try:
        blobs.check_size(blob_ref(data))
        if shutil.disk_usage(path.parent).free < len(data) + RESERVED_FREE_BYTES:
            raise ResourceError(f"{path.parent}: no room for {len(data)} bytes; free some disk space")
        write_atomically(path, data)
    except ResourceError as exc:
        logger.warning("the weights are not kept for the next round's delta: %s", exc)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise BundleError(f"weights {path.name[:12]}… cannot be read: {exc.strerror or exc}") from exc
