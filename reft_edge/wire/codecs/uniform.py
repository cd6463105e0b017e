"""A codec that treats every tensor of a model alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    compares: bool = False

    def choose(
        self,
        tensors: Iterable[tuple[str, FloatArray]],  # noqa: ARG002
        norms: Mapping[str, FloatArray],  # noqa: ARG002
    ) -> Callable[[str], TensorCodec]:
        return lambda _: self.decoder
