"""EF21: device and coordinator keep the same estimate of the device's update, and only its correction travels.

    c_t = C(x_t - g_t),   g_{t+1} = g_t + c_t,   and g_{t+1} is the update that is merged

(Richtarik, Sokolov and Fatkhullin, arXiv 2106.05203, algorithm 2), with the device's model update x_t in the gradient's
place. Where updates settle, x - g shrinks, and so does what a contraction C loses: the error follows the change of the
updates instead of their size, which devices of very different data need. Not the sum over the rounds is kept, but the
last estimate: ||x_t - g_{t+1}||^2 <= (1 - delta) ||x_t - g_t||^2.

Both sides add the same float32 numbers in the same order, so their memories are equal bit for bit. A device that misses
a round misses a correction, nothing else; one whose memory differs from the coordinator's must start from zero. What a
codec carries exactly has no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.tensors import decode_tensors, encode_tensors
from reft_edge.wire.compensation.derived import Derived, added
from reft_edge.wire.compensation.memory import corrected, remembered

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import TensorSpec
    from reft_edge.types import Array, FloatArray, Tensors
    from reft_edge.wire.codec_names import Codec


class EF21:
    """Device side. `state` is g; keep it between rounds as long as the coordinator keeps its memory."""

    def __init__(self, codec: Codec, state: Tensors | None = None) -> None:
        self._codec = codec
        self._estimate: dict[str, Array] = dict(state or {})

    @property
    def state(self) -> dict[str, Array]:
        """float32 tensors, of those names whose encoding loses something."""
        return dict(self._estimate)

    def encode(
        self,
        update: Tensors,
        *,
        rng: np.random.Generator | None = None,
        norms: Mapping[str, FloatArray] | None = None,
    ) -> bytes:
        """What corrects the coordinator's estimate of `update`. Raises `BundleError`, and keeps the estimate."""
        estimate: dict[str, Array] = {}

        def follow(name: str, sent: FloatArray, received: FloatArray) -> None:  # noqa: ARG001
            estimate[name] = corrected(name, self._estimate.get(name), received)

        difference = Derived(update, lambda name, tensor: added(tensor, self._estimate.get(name), sign=-1))
        data = encode_tensors(difference, self._codec, rng=rng, norms=norms, on_encoded=follow)
        self._estimate = estimate
        return data


def decode_ef21(
    data: bytes, codec: Codec, specs: Sequence[TensorSpec], memory: Tensors | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Coordinator side: the update, and the memory for this device's next one. Raises `BundleError`."""
    return remembered(decode_tensors(data, codec, specs), codec, specs, memory or {})
