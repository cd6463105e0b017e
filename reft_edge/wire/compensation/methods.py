"""From the options of a compensation to the code: what a device encodes with, and what a coordinator decodes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from reft_edge.wire.codec_names import Codec, RandomK, TopK
from reft_edge.wire.codecs.tensors import decode_tensors, encode_tensors
from reft_edge.wire.compensation.deep_gradient import DeepGradientCompression, warm_up_fraction
from reft_edge.wire.compensation.econtrol import EControl, decode_econtrol
from reft_edge.wire.compensation.ef21 import EF21, decode_ef21
from reft_edge.wire.compensation.error_feedback import ErrorFeedback
from reft_edge.wire.compensation_names import (
    Compensation,
    DeepGradientOptions,
    EControlOptions,
    EF21Options,
    ErrorFeedbackOptions,
    Uncompensated,
)

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import TensorSpec
    from reft_edge.types import Array, FloatArray, Tensors


class UpdateEncoder(Protocol):
    """The device's side of a compensation."""

    @property
    def state(self) -> dict[str, Array]:
        """Tensors to keep until the next round; none for a method without memory."""

    def encode(
        self,
        update: Tensors,
        *,
        rng: np.random.Generator | None = None,
        norms: Mapping[str, FloatArray] | None = None,
    ) -> bytes:
        """A container blob. Raises `BundleError`, and keeps the state, for values that are not finite."""


class Plain:
    """`UpdateEncoder` that compensates for nothing."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    @property
    def state(self) -> dict[str, Array]:
        return {}

    def encode(
        self,
        update: Tensors,
        *,
        rng: np.random.Generator | None = None,
        norms: Mapping[str, FloatArray] | None = None,
    ) -> bytes:
        return encode_tensors(update, self._codec, rng=rng, norms=norms)


def update_encoder(compensation: Compensation, codec: Codec, state: Tensors | None = None) -> UpdateEncoder:
    """Device side, going on from the `state` of the round before."""
    match compensation:
        case Uncompensated():
            return Plain(codec)
        case ErrorFeedbackOptions():
            return ErrorFeedback(codec, state)
        case EF21Options():
            return EF21(codec, state)
        case EControlOptions():
            return EControl(codec, state, options=compensation)
        case DeepGradientOptions():
            return DeepGradientCompression(codec, state, options=compensation)


def decode_update(
    compensation: Compensation, data: bytes, codec: Codec, specs: Sequence[TensorSpec], memory: Tensors | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Coordinator side: the update, and what to remember for this device's next one. Raises `BundleError`."""
    match compensation:
        case EF21Options():
            return decode_ef21(data, codec, specs, memory)
        case EControlOptions():
            return decode_econtrol(data, codec, specs, memory)
        case _:
            return decode_tensors(data, codec, specs), {}


def codec_in_round(codec: Codec, compensation: Compensation, round_number: int) -> Codec:
    """The codec that a task of this round, counted from 1, names: sparse ones may send more in the first rounds."""
    if not isinstance(compensation, DeepGradientOptions) or not isinstance(codec, TopK | RandomK):
        return codec
    rounds = compensation.warm_up_rounds
    return msgspec.structs.replace(
        codec, fraction=warm_up_fraction(codec.fraction, round_number=round_number, rounds=rounds)
    )
