"""Names and options of codecs: how the tensors of a weights or update blob are represented.

They stand in messages and settings, which the agent's daemon reads: nothing here loads numpy. `wire.codecs` implements
them. Unlike other parts of a message, a codec must not have options that the reader does not know: they change what the
bytes mean.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

Fraction: TypeAlias = Annotated[float, Meta(gt=0, le=1)]

SparseValues: TypeAlias = Literal["float32", "int8"]
"""How the entries that travel are represented; int8 has one scale for a tensor."""


class _Options(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="name"
):
    """What all codecs have in common as values."""


class Float32(_Options, frozen=True, kw_only=True, tag="float32"):
    """As they are."""


class Float16(_Options, frozen=True, kw_only=True, tag="float16"):
    """Half of float32's bytes."""


class Int8(_Options, frozen=True, kw_only=True, tag="int8"):
    """8 bits an entry, with a scale for each channel."""

    stochastic: bool = False
    """Round up or down by chance, so that the expectation is exact; else to the nearest."""


class Int4(_Options, frozen=True, kw_only=True, tag="int4"):
    """4 bits an entry, with a scale for each channel."""

    stochastic: bool = False
    """As for `Int8`."""


class TopK(_Options, frozen=True, kw_only=True, tag="top_k"):
    """The largest entries of each tensor, and where they are."""

    fraction: Fraction = 0.05
    values: SparseValues = "int8"


class RandomK(_Options, frozen=True, kw_only=True, tag="random_k"):
    """Entries drawn by chance; where they are follows from a seed, which travels in their place."""

    fraction: Fraction = 0.05
    values: SparseValues = "int8"
    unbiased: bool = False
    """Scaled by 1 / fraction, so that the expectation is exact; else a contraction, for error feedback."""


class LayerWise(_Options, frozen=True, kw_only=True, tag="layer_wise"):
    """Each tensor as coarse as a bound on the whole model's error allows, with the fewest bytes."""

    error_budget: Annotated[float, Meta(gt=0, lt=1)] = 0.3
    """Norm of the error over the norm of the update, at most."""


class Selective(_Options, frozen=True, kw_only=True, tag="selective"):
    """Channels that changed by less than a threshold stay at home; the others travel as int8."""

    threshold: Annotated[float, Meta(ge=0, le=1000)] = 0.02
    """Norm of a channel's change over the norm of its weights."""


Codec: TypeAlias = Float32 | Float16 | Int8 | Int4 | TopK | RandomK | LayerWise | Selective

CodecName: TypeAlias = Literal["float32", "float16", "int8", "int4", "top_k", "random_k", "layer_wise", "selective"]
"""In a settings file the name alone stands for a codec with its default options."""

_BY_NAME: dict[CodecName, Codec] = {
    "float32": Float32(),
    "float16": Float16(),
    "int8": Int8(),
    "int4": Int4(),
    "top_k": TopK(),
    "random_k": RandomK(),
    "layer_wise": LayerWise(),
    "selective": Selective(),
}


def find_codec(choice: CodecName | Codec) -> Codec:
    """The codec that a settings file means by a name, or by a table with a name and options."""
    return _BY_NAME[choice] if isinstance(choice, str) else choice


def codec_text(codec: Codec) -> str:
    """A codec in a line, the same for equal codecs: its name and what differs from its defaults."""
    fields = msgspec.structs.fields(codec)
    changed = [f"{field.name}={value}" for field in fields if (value := getattr(codec, field.name)) != field.default]
    return " ".join([str(codec.__struct_config__.tag), *changed])


def keeps_every_entry(codec: Codec) -> bool:
    """Whether every entry is carried, if only roughly: whole weights need that, differences do not."""
    return isinstance(codec, Float32 | Float16 | Int8 | Int4)
