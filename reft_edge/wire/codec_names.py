"""Names and options of codecs: how the tensors of a weights or update blob are represented.

They stand in messages and settings, which the agent's daemon reads: nothing here loads numpy. `wire.codecs` implements
them. Unlike other parts of a message, a codec must not have options that the reader does not know: they change what the
bytes mean.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec


class Float32(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="float32", tag_field="name"):
    """As they are."""


class Float16(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="float16", tag_field="name"):
    """Half of float32's bytes."""


class Int8(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag="int8",
    tag_field="name",
):
    """8 bits an entry, with a scale for each channel."""

    stochastic: bool = False
    """Round up or down by chance, so that the expectation is exact; else to the nearest."""


Codec: TypeAlias = Float32 | Float16 | Int8

CodecName: TypeAlias = Literal["float32", "float16", "int8"]
"""Codecs that need no options; in a settings file their name is enough."""

_BY_NAME: dict[CodecName, Codec] = {"float32": Float32(), "float16": Float16(), "int8": Int8()}


def find_codec(choice: CodecName | Codec) -> Codec:
    """The codec that a settings file means by a name, or by a table with a name and options."""
    return _BY_NAME[choice] if isinstance(choice, str) else choice


def codec_text(codec: Codec) -> str:
    """A codec in a line, the same for equal codecs: its name and what differs from its defaults."""
    options = msgspec.to_builtins(codec)
    name = options.pop("name")
    return " ".join([name, *(f"{key}={value}" for key, value in options.items())])
