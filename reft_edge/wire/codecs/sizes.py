"""How many bytes a model's tensors take on the wire, from their shapes alone: for plans, before anything is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from reft_edge.wire.codecs.registry import implementation
from reft_edge.wire.codecs.tensors import parts_of

if TYPE_CHECKING:
    from reft_edge.bundle.manifest import TensorSpec
    from reft_edge.wire.codec_names import Codec

HEADER_BYTES = 100
"""Of an entry in the container's header, beside its name."""


def encoded_bytes(tensors: Sequence[TensorSpec], codec: Codec) -> int:
    """Bytes of a weights or update blob.

    Before lossless compression, so a bound, for codecs whose entries take a fixed number of bits; where that depends on
    the values, what updates usually come to.
    """
    decoder = implementation(codec).decoder
    parts = [(spec.name, part) for spec in tensors for part in parts_of(spec, decoder).values()]
    return ceil(sum(HEADER_BYTES + len(name) + part.expected_bytes for name, part in parts))
