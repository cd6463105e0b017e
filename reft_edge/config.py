"""TOML files to typed, checked settings.

A settings file is a frozen `msgspec.Struct` that forbids unknown fields; its class is the one place where a key, its
type and its default are written. Every error names the file, the key and what would be right.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from reft_edge.errors import ConfigError

Settings = TypeVar("Settings", bound=msgspec.Struct)

MAX_SETTINGS_BYTES = 1 << 16
"""64 KiB, room for a thousand class names: a settings file larger than this is some other file."""

MAX_DOTS_IN_LINE = 100
"""`tomllib` takes quadratic time and memory for a key like a.a.a.a...: 16 s for one of 64 KiB."""

_INTEGER_LIMIT = 2**63
"""TOML's integers have 64 bits; Python's parser takes any."""

_MISSING_FIELD = re.compile(r"missing required field `(?P<field>[^`]*)`")
_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<field>[^`]*)`")
_INVALID_CHOICE = re.compile(r"Invalid enum value '(?P<value>.*)'")


def load_settings(path: Path, kind: type[Settings]) -> Settings:
    """Read the TOML file at `path` as `kind`.

    Raises `ConfigError` when the file is missing, is not TOML, has an unknown key, or a value that is of no use.
    """
    return convert_settings(read_toml(path), kind, origin=str(path))


def convert_settings(table: dict[str, Any], kind: type[Settings], *, origin: str) -> Settings:
    """Check an already parsed TOML table; `origin` names it in errors."""
    _check_numbers(table, origin)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{origin}: {_explain(str(exc), kind)}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{origin}: tables are nested too deeply; this is not a settings file") from exc


def read_toml(path: Path) -> dict[str, Any]:
    """Parse the TOML file at `path`; raises `ConfigError` with file, line and column."""
    try:
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_SETTINGS_BYTES} bytes; this is not a settings file")
        text = path.read_text(encoding="utf-8")
        if any(line.count(".") > MAX_DOTS_IN_LINE for line in text.split("\n")):
            raise ConfigError(f"{path}: a line has more than {MAX_DOTS_IN_LINE} dots; this is not a settings file")
        return tomllib.loads(text)
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file") from exc
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not a text file; expected TOML in UTF-8") from exc
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError, numbers of thousands of digits, endless brackets
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc


def _check_numbers(table: dict[str, Any], origin: str) -> None:
    """Raise `ConfigError` for inf, nan and integers beyond TOML's: bounds let nan through."""
    waiting: list[tuple[str, Any]] = list(table.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, each) for each in value)
        elif isinstance(value, float) and not isfinite(value):
            raise ConfigError(f"{origin}: {key} = {value!r} is not a number that one can calculate with")
        elif isinstance(value, int) and not -_INTEGER_LIMIT <= value < _INTEGER_LIMIT:
            raise ConfigError(f"{origin}: {key} is an integer of more than 64 bits")


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else `; known are ...`."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"


def _explain(message: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's message with the TOML path in the usual notation and, for a misspelt key, the nearest known key."""
    text, _, location = message.partition(" - at `")
    path = location.rstrip("`").removeprefix("$").removeprefix(".")
    unknown = _UNKNOWN_FIELD.search(text)
    if unknown:
        return (
            f"{f'[{path}] ' if path else ''}unknown key {unknown['field']!r}{_right_key(unknown['field'], path, kind)}"
        )
    invalid = _INVALID_CHOICE.fullmatch(text)
    if invalid:
        return f"{path}: unknown value {invalid['value']!r}{did_you_mean(invalid['value'], _choices(kind, path))}"
    missing = _MISSING_FIELD.search(text)
    if missing:
        return f"{f'[{path}] ' if path else ''}lacks the key {missing['field']!r}"
    return f"{path}: {text}" if path else text


def _right_key(field: str, path: str, kind: type[msgspec.Struct]) -> str:
    """The nearest key of the table at `path`, or the table that `field` belongs to."""
    tables = _tables(kind)
    known = tables.get(path, set())
    if difflib.get_close_matches(field, known, n=1):
        return did_you_mean(field, sorted(known))
    homes = sorted(
        f"[{place}]" if place else "the beginning, before any [table]," for place in tables if field in tables[place]
    )
    return f"; it belongs to {' or '.join(homes)}" if homes else did_you_mean(field, sorted(known))


def _tables(kind: type[msgspec.Struct]) -> dict[str, set[str]]:
    """The keys of a settings class by the path of their table; "" is the class itself."""
    found: dict[str, set[str]] = {}
    waiting: list[tuple[str, Any]] = [("", msgspec.inspect.type_info(kind))]
    while waiting:
        path, info = waiting.pop()
        for each in _alternatives(info):
            if isinstance(each, msgspec.inspect.StructType):
                found.setdefault(path, set()).update(field.encode_name for field in each.fields)
                waiting.extend((f"{path}.{field.encode_name}".lstrip("."), field.type) for field in each.fields)
    return found


def _choices(kind: type[msgspec.Struct], path: str) -> list[str]:
    """The words that a value may be, at the dotted `path` of a key."""
    infos: list[Any] = [msgspec.inspect.type_info(kind)]
    for name in path.split("."):
        infos = [
            field.type
            for info in infos
            for each in _alternatives(info)
            if isinstance(each, msgspec.inspect.StructType)
            for field in each.fields
            if field.encode_name == name
        ]
    literals = [each for info in infos for each in _alternatives(info) if isinstance(each, msgspec.inspect.LiteralType)]
    return [str(value) for each in literals for value in each.values]


def _alternatives(info: Any) -> tuple[Any, ...]:
    """The members of a union; else the one type."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _alternatives(info.type)
    return info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
