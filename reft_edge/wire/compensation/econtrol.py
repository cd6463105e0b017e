"""EControl: EF21's estimate and error feedback's residual at once, the residual fed back with a strength of its own.

    c_t = C(eta e_t + x_t - h_t),   h_{t+1} = h_t + c_t,   e_{t+1} = e_t + x_t - h_{t+1},   merged is h_{t+1}

(Gao, Islamov and Stich, arXiv 2311.05645, algorithm 2), with the device's model update x_t in the gradient's place. The
sum of what was merged and of the residual is the sum of the true updates, as with error feedback; and the error follows
the change of the updates, as with EF21. `strength` is eta: 1 feeds back everything at once, which may swing when C
drops much; the paper's theory asks for the order of C's delta.

Memory on both sides, equal bit for bit, as in `ef21`; the device keeps e besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.tensors import decode_tensors, encode_tensors
from reft_edge.wire.compensation.derived import Derived, added
from reft_edge.wire.compensation.memory import corrected, remembered
from reft_edge.wire.compensation_names import EControlOptions

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import TensorSpec
    from reft_edge.types import Array, FloatArray, Tensors
    from reft_edge.wire.codec_names import Codec

ESTIMATE, RESIDUAL = "estimate::", "residual::"
"""Prefixes of the two tensors that `EControl.state` has for each name."""

DEFAULT = EControlOptions()


class EControl:
    """Device side. Keep `state` between rounds as long as the coordinator keeps its memory."""

    def __init__(self, codec: Codec, state: Tensors | None = None, *, options: EControlOptions = DEFAULT) -> None:
        self._codec = codec
        self._strength = np.float32(options.strength)
        self._state: dict[str, Array] = dict(state or {})

    @property
    def state(self) -> dict[str, Array]:
        """float32 tensors, two for each name whose encoding loses something."""
        return dict(self._state)

    def encode(
        self,
        update: Tensors,
        *,
        rng: np.random.Generator | None = None,
        norms: Mapping[str, FloatArray] | None = None,
    ) -> bytes:
        """What corrects the coordinator's estimate of `update`. Raises `BundleError`, and keeps the state."""
        following: dict[str, Array] = {}

        def follow(name: str, sent: FloatArray, received: FloatArray) -> None:  # noqa: ARG001
            estimate = corrected(name, self._state.get(ESTIMATE + name), received)
            following[ESTIMATE + name] = estimate
            error = np.asarray(update[name], np.float32) - estimate
            following[RESIDUAL + name] = added(error, self._state.get(RESIDUAL + name))

        def difference(name: str, tensor: Array) -> Array:
            residual = self._state.get(RESIDUAL + name)
            fed_back = tensor if residual is None else added(tensor, self._strength * residual)
            return added(fed_back, self._state.get(ESTIMATE + name), sign=-1)

        data = encode_tensors(Derived(update, difference), self._codec, rng=rng, norms=norms, on_encoded=follow)
        self._state = following
        return data


def decode_econtrol(
    data: bytes, codec: Codec, specs: Sequence[TensorSpec], memory: Tensors | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Coordinator side: the update h_{t+1}, and the memory for this device's next one. Raises `BundleError`."""
    return remembered(decode_tensors(data, codec, specs), codec, specs, memory or {})
