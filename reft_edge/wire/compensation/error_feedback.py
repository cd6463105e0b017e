"""Error feedback: what a codec left out of earlier updates is added to the next one.

    C_t = C(x_t + e_t),   e_{t+1} = x_t + e_t - C_t

(Seide et al. 2014; Karimireddy et al., arXiv 1901.09847, algorithm 2). The sum of what was decoded and of the residual
is the sum of the true updates, however many rounds pass, so nothing is lost for good. For a codec with contraction
factor delta the residual stays bounded: E||e||^2 <= 4 (1 - delta) / delta^2 max||x||^2 (ibid., lemma 3).

The receiver needs no memory. Deliberately not for codecs that are unbiased by scaling up (random-k with `unbiased`):
they are no contraction, and their residual grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.tensors import encode_tensors
from reft_edge.wire.compensation.derived import Derived, added

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors
    from reft_edge.wire.codec_names import Codec


class ErrorFeedback:
    """Device side. Keep `state` between rounds; it belongs to one variant of one run."""

    def __init__(self, codec: Codec, state: Tensors | None = None) -> None:
        self._codec = codec
        self._residual: dict[str, Array] = dict(state or {})

    @property
    def state(self) -> dict[str, Array]:
        """The residual: float32 tensors, of those names whose encoding loses something."""
        return dict(self._residual)

    def encode(
        self,
        update: Tensors,
        *,
        rng: np.random.Generator | None = None,
        norms: Mapping[str, FloatArray] | None = None,
    ) -> bytes:
        """`update` plus the residual as a container blob; the residual becomes what that blob leaves out.

        A residual whose tensor is gone or has another shape is dropped. Raises `BundleError`, and keeps the residual,
        for values that are not finite.
        """
        left_out: dict[str, Array] = {}

        def keep(name: str, sent: FloatArray, received: FloatArray) -> None:
            left_out[name] = sent - received

        corrected = Derived(update, lambda name, tensor: added(tensor, self._residual.get(name)))
        data = encode_tensors(corrected, self._codec, rng=rng, norms=norms, on_encoded=keep)
        self._residual = left_out
        return data
