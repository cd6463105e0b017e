"""Which code implements which codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_edge.wire.codec_names import Codec, Float16, Float32, Int4, Int8, LayerWise, RandomK, Selective, TopK
from reft_edge.wire.codecs.float16 import Float16Codec
from reft_edge.wire.codecs.float32 import Float32Codec
from reft_edge.wire.codecs.int4 import Int4Codec
from reft_edge.wire.codecs.int8 import Int8Codec
from reft_edge.wire.codecs.layer_wise import LayerWiseCodec
from reft_edge.wire.codecs.random_k import RandomKCodec
from reft_edge.wire.codecs.selective import SelectiveCodec
from reft_edge.wire.codecs.top_k import TopKCodec
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
        case Int4(stochastic=stochastic):
            return Uniform(decoder=Int4Codec(stochastic=stochastic), draws=stochastic)
        case TopK(fraction=fraction, values=values):
            return Uniform(decoder=TopKCodec(fraction=fraction, values=values))
        case RandomK(fraction=fraction, values=values, unbiased=unbiased):
            decoder = RandomKCodec(fraction=fraction, values=values, unbiased=unbiased)
            return Uniform(decoder=decoder, draws=True)
        case LayerWise(error_budget=error_budget):
            return LayerWiseCodec(error_budget=error_budget)
        case Selective(threshold=threshold):
            return SelectiveCodec(threshold=threshold)
