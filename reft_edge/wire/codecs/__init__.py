"""Tensors as they travel. One interface, one file a codec; what the bytes of a codec are, its file says.

Uses numpy: for the worker and the coordinator, not for the agent's daemon, which knows names and options only
(`wire.codec_names`).
"""

from reft_edge.wire.codecs.sizes import encoded_bytes
from reft_edge.wire.codecs.tensors import decode_tensors, encode_tensors, weight_norms

__all__ = ["encode_tensors", "decode_tensors", "encoded_bytes", "weight_norms"]
