"""A codec that treats every tensor of a model alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_edge.types import FloatArray
    from reft_edge.wire.codecs.tensor_codec import TensorCodec


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """`ModelCodec` of one `TensorCodec`."""

    decoder: TensorCodec
    draws: bool = False

    def choose(self, tensors: Iterable[tuple[str, FloatArray]]) -> Callable[[str], TensorCodec]:  # noqa: ARG002
        return lambda _: self.decoder
