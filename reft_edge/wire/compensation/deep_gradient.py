"""Deep gradient compression: sparse messages whose leftovers gather momentum (Lin et al., arXiv 1712.01887).

    u <- m u + (1 - m) clip(x_t),   v <- v + u,   sent is C(v);   where sent: v <- v - C(v), u <- 0

The paper compresses gradients of single steps; here x_t is what a device's whole local training changed. Adapted so:

- Momentum correction (section 3.2, eq. 4): u gathers updates *across* rounds; the momentum within a round is the local
  optimizer's. u is damped by 1 - m, which the paper leaves to the learning rate: without it an update would be applied
  1 / (1 - m) times over. All of x_t arrives in the end: sum of sent + v + u m / (1 - m) = sum of x, where nothing has
  been masked.
- Local clipping (section 3.2): an update longer than `clip` times the running mean of the device's own lengths is
  shortened to it. The paper's bound for N workers needs all gradients' norm, which no device knows.
- Momentum factor masking (section 3.2): what has just been sent stops gathering momentum. What u would still have
  added is given up, so stale directions do not push on.
- v keeps what rounding left of the values that were sent; the paper sends them exactly and sets v to 0 there.
- Warm-up (section 3.3): the first rounds send more, `warm_up_fraction`; the coordinator names the fraction with each
  task, so the device needs no notion of it.
- Vectors, which travel whole, are neither damped nor clipped.

The receiver needs no memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.wire.codecs.tensor_codec import squared_norm
from reft_edge.wire.codecs.tensors import encode_tensors, lossy_names
from reft_edge.wire.compensation.derived import Derived, added
from reft_edge.wire.compensation_names import DeepGradientOptions

if TYPE_CHECKING:
    from reft_edge.types import Array, FloatArray, Tensors
    from reft_edge.wire.codec_names import Codec

MOMENTUM_OF, LEFTOVER = "momentum::", "leftover::"
"""Prefixes of the two tensors that `DeepGradientCompression.state` has for each name: u and v."""

LENGTH = "length"
"""float32 (), the running mean of the lengths of this device's updates."""

MEMORY = 0.25
"""Weight of the newest length in that mean."""

FIRST_FRACTION = 0.25
"""Of the first round's entries that travel: the paper's warm-up begins with a sparsity of 75%."""

DEFAULT = DeepGradientOptions()


class DeepGradientCompression:
    """Device side. Keep `state` between rounds; it belongs to one variant of one run."""

    def __init__(self, codec: Codec, state: Tensors | None = None, *, options: DeepGradientOptions = DEFAULT) -> None:
        self._codec = codec
        self._options = options
        self._state: dict[str, Array] = dict(state or {})

    @property
    def state(self) -> dict[str, Array]:
        """float32 tensors: two for each name whose encoding loses something, and one length."""
        return dict(self._state)

    def encode(
        self,
        update: Tensors,
        *,
        rng: np.random.Generator | None = None,
        norms: Mapping[str, FloatArray] | None = None,
    ) -> bytes:
        """The largest of what `update` and earlier leftovers amount to. Raises `BundleError`, and keeps the state."""
        names = set(lossy_names(update, self._codec))
        shortening, length = self._clipping(update, names)
        following: dict[str, Array] = {LENGTH: np.array(length, np.float32)}
        momentum = np.float32(self._options.momentum)

        def momentum_of(name: str, tensor: Array) -> Array:
            before = self._state.get(MOMENTUM_OF + name)
            fresh = tensor * ((1 - momentum) * shortening)
            return fresh if before is None else added(fresh, momentum * before)

        def gathered(name: str, tensor: Array) -> Array:
            if name not in names:
                return tensor
            return added(momentum_of(name, tensor), self._state.get(LEFTOVER + name))

        def keep(name: str, sent: FloatArray, received: FloatArray) -> None:
            following[LEFTOVER + name] = sent - received
            gathering = momentum_of(name, np.asarray(update[name])).astype(np.float32, copy=False)
            following[MOMENTUM_OF + name] = np.where(received != 0, np.float32(0), gathering)

        data = encode_tensors(Derived(update, gathered), self._codec, rng=rng, norms=norms, on_encoded=keep)
        self._state = following
        return data

    def _clipping(self, update: Tensors, names: Collection[str]) -> tuple[np.float32, float]:
        """What the update is multiplied with, and the running mean of lengths after it."""
        length = sqrt(sum(squared_norm(np.asarray(update[name])) for name in sorted(names)))
        usual = float(self._state[LENGTH]) if LENGTH in self._state else length
        allowed = self._options.clip * usual
        clipped = length if usual == 0 else min(length, allowed)
        shortening = np.float32(clipped / length if length > 0 else 1.0)
        return shortening, (1 - MEMORY) * usual + MEMORY * clipped


def warm_up_fraction(fraction: float, *, round_number: int, rounds: int) -> float:
    """The fraction that travels in a round, counted from 1: from `FIRST_FRACTION` by equal factors to `fraction`.

    The paper's schedule (section 3.3) over rounds instead of epochs, for any number of them.
    """
    if round_number > rounds or fraction >= FIRST_FRACTION:
        return fraction
    return FIRST_FRACTION * float((fraction / FIRST_FRACTION) ** ((round_number - 1) / rounds))
