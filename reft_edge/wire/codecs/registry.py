"""Which code implements which codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_edge.wire.codec_names import Codec, Float16, Float32, Int8
from reft_edge.wire.codecs.float16 import Float16Codec
from reft_edge.wire.codecs.float32 import Float32Codec
from reft_edge.wire.codecs.int8 import Int8Codec
from reft_edge.wire.codecs.uniform import Uniform

if TYPE_CHECKING:
    from reft_edge.wire.codecs.tensor_codec import ModelCodec


def implementation(codec: Codec) -> ModelCodec:
    """The code for a codec with its options."""
    match codec:
        case Float32():
            return Uniform(decoder=Float32Codec())
        case Float16():
            return Uniform(decoder=Float16Codec())
        case Int8(stochastic=stochastic):
            return Uniform(decoder=Int8Codec(stochastic=stochastic), draws=stochastic)
