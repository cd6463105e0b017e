"""Near-valid inputs: a valid one, changed where it hurts.

Random bytes are refused at the first check. So a mutation keeps most of an input: it replaces one value of a JSON
document or of a TOML file by a nasty one, doubles or moves a field, or flips, cuts and splices bytes. Deterministic:
the same generator state gives the same input.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

MAX_INPUT_BYTES = 1 << 18
"""256 KiB: beyond every limit on messages, so that the limits themselves are tried."""

NUMBERS = (
    *("0", "-0", "-1", "1", "2", "7", "127", "128", "255", "256", "65535", "65536", "2147483647", "2147483648"),
    *("4294967295", "4294967296", "9007199254740992", "9007199254740993", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551615", "18446744073709551616", "-9223372036854775809"),
    *("1e-320", "5e-324", "1e-300", "-1e-9", "0.5", "1.0", "1e15", "1e22", "1e154", "1e308", "1e309", "-0.0"),
    *("9" * digits for digits in (30, 400, 4300, 4301)),
)
"""Around every limit, as text: a number may be longer than its type."""

STRINGS = (
    "",
    "\x00",
    "\n2026-01-01 00:00:00 ERROR forged",
    "\x1b[2J\x1b]0;title\x07",
    "\u202etxt.exe",
    "[red]",
    "../../etc/passwd",
    "a/b",
    "+",
    "#",
    "\udfff",
    "é",
    "\U0001f980",
    "NaN",
    "x" * 64,
    "x" * 65,
    "x" * 2001,
    "x" * 70_000,
    "0" * 64,
    "f" * 64,
    "AA==",
    "AA=",
    "A" * 11 + "=",
    "::scale",
    "__metadata__",
    "|flat",
)

_TOML_VALUES = (
    *NUMBERS,
    "inf",
    "-inf",
    "nan",
    "true",
    '""',
    '"x"',
    r'"\u0000"',
    r'"a\nb"',
    "[]",
    "{}",
    "[[[[[[[[]]]]]]]]",
    "[" * 2000,
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "0x" + "f" * 5000,
    "{a.b.c=1}",
    "'" + "y" * 10_000 + "'",
)
_TOML_LINES = ("[x]", "[[x]]", "[data]", "a.b.c.d = 1", ".".join("a" * 2000) + " = 1", "= 1", "\x00", "\ufeff")

_NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][+-]?\d+)?")


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes], *, text: bool) -> bytes:
    """A few changes to `data`; `others` are inputs to take parts from."""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        data = _change(data, rng, others, text=text)
    return data[:MAX_INPUT_BYTES]


def _change(data: bytes, rng: random.Random, others: Sequence[bytes], *, text: bool) -> bytes:
    if text and rng.random() < 0.7:
        if data[:1] in (b"{", b"["):
            return _change_json(data, rng)
        if b"=" in data:
            return _change_toml(data, rng)
    return rng.choice(_BYTE_CHANGES)(data, rng, others)


# JSON.


class _Number(int):
    """A number that is written as it stands."""

    def __new__(cls, text: str) -> _Number:
        made = super().__new__(cls, 0)
        made.text = text
        return made

    text: str


_decoder = json.JSONDecoder(parse_int=_Number, parse_float=_Number)


def _change_json(data: bytes, rng: random.Random) -> bytes:
    """Change the document that `data` begins with; bytes after it, as in a container, stay."""
    text = data.decode("latin-1")
    try:
        document, end = _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return _replace_number(data, rng, ())
    return _change_document(document, rng) + data[end:]


def _change_document(document: Any, rng: random.Random) -> bytes:
    places = list(_places(document))
    if not places:
        return _written(document)
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6:
        holder[key] = _nasty(rng, holder[key])
    elif kind < 0.7 and isinstance(holder, dict):
        del holder[key]
    elif kind < 0.8 and isinstance(holder, dict):
        holder[rng.choice(STRINGS)] = _nasty(rng, holder[key])
    elif kind < 0.9:
        other, other_key = rng.choice(places)
        holder[key] = _decoder.decode(_written(other[other_key]).decode())
    else:
        text = _written(document)
        return text.replace(b"{", b'{"' + rng.choice([b"type", b"name", b"x"]) + b'":1,', 1)  # perhaps a second one
    return _written(document)


def _places(document: Any) -> Any:
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        pairs = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for key, value in pairs[:200]:
            yield holder, key
            if isinstance(value, (dict, list)):
                waiting.append(value)


def _nasty(rng: random.Random, old: Any) -> Any:
    kind = rng.random()
    if kind < 0.45:
        return _Number(rng.choice(NUMBERS))
    if kind < 0.7:
        return rng.choice(STRINGS)
    if kind < 0.8 and isinstance(old, list):
        return old * rng.choice([0, 2, 70])
    nested: Any = []
    for _ in range(rng.choice([0, 1, 3, 100])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return rng.choice([None, True, False, nested, {}, [old], [old, old], {"a": old}])


def _written(document: Any) -> bytes:
    """JSON with numbers as they stand; lone surrogates become escapes."""
    text = json.dumps(_marked(document), ensure_ascii=True, separators=(",", ":"))
    return re.sub(r'"\\u0001([^"]*)"', r"\1", text).encode()


def _marked(value: Any) -> Any:
    """Numbers as marked strings, which `_written` unquotes."""
    if isinstance(value, _Number):
        return f"\x01{value.text}"
    if isinstance(value, dict):
        return {key: _marked(each) for key, each in value.items()}
    return [_marked(each) for each in value] if isinstance(value, list) else value


# TOML.


def _change_toml(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.random()
    name, equals, _ = lines[at].partition(b"=")
    if kind < 0.7 and equals:
        lines[at] = name + b"= " + rng.choice(_TOML_VALUES).encode("utf-8", "surrogatepass")
    elif kind < 0.8:
        del lines[at]
    elif kind < 0.9:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    else:
        lines.insert(at, rng.choice(_TOML_LINES).encode())
    return b"\n".join(lines)


# Bytes.


def _flip(data: bytes, rng: random.Random, _others: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _overwrite(data: bytes, rng: random.Random, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice([rng.randbytes(rng.choice([1, 2, 4, 8])), b"\xff" * 8, b"\x00" * 8, b"\x7f", b"\x80"])
    return data[:at] + piece + data[at + len(piece) :]


def _cut(data: bytes, rng: random.Random, _others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytes, rng: random.Random, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice([1, 2, 4, 16, 64]) :]


def _repeat(data: bytes, rng: random.Random, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.choice([1, 2, 8, 64, 1024])]
    return data[:at] + piece * rng.choice([1, 1, 2, 50]) + data[at:]


def _splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else b""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _insert(data: bytes, rng: random.Random, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 3, 8, 32])) + data[at:]


def _replace_number(data: bytes, rng: random.Random, _others: Sequence[bytes]) -> bytes:
    found = list(_NUMBER.finditer(data[:4096]))
    if not found:
        return _insert(data, rng, ())
    number = rng.choice(found)
    return data[: number.start()] + rng.choice(NUMBERS).encode() + data[number.end() :]


_BYTE_CHANGES = (_flip, _overwrite, _cut, _remove, _repeat, _splice, _insert, _replace_number)
