"""The estimate of a device's update that device and coordinator both keep, and how a message corrects it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import BundleError
from reft_edge.wire.codecs.tensors import compensated

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import TensorSpec
    from reft_edge.types import Array, FloatArray, Tensors
    from reft_edge.wire.codec_names import Codec


def corrected(name: str, estimate: Array | None, correction: FloatArray) -> FloatArray:
    """The next estimate, float32; one that is missing or of another shape counts as 0. Raises `BundleError`.

    Both sides call this with the same numbers: it is what makes their memories equal.
    """
    if estimate is None or estimate.shape != correction.shape:
        return correction.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        following: FloatArray = np.add(estimate, correction, dtype=np.float32)
    if not np.isfinite(following).all():
        raise BundleError(f"what is remembered of {name!r} has grown beyond all numbers")
    return following


def remembered(
    message: dict[str, Array], codec: Codec, specs: Sequence[TensorSpec], memory: Tensors
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The update and the next memory from a decoded `message`, which corrects `memory`. Raises `BundleError`.

    In the update's own dtype; the memory stays float32.
    """
    update, following = message, {}
    for spec in compensated(specs, codec):
        following[spec.name] = corrected(spec.name, memory.get(spec.name), message[spec.name].astype(np.float32))
        update[spec.name] = following[spec.name].astype(np.dtype(spec.dtype), copy=False)
    return update, following
