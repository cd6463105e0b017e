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
        field = unknown["field"]
        known = sorted(_all_fields(kind))
        where = f"[{path}] " if path else ""
        return f"{where}unknown key {field!r}{did_you_mean(field, known)}"
    missing = _MISSING_FIELD.search(text)
    if missing:
        return f"{f'[{path}] ' if path else ''}lacks the key {missing['field']!r}"
    return f"{path}: {text}" if path else text


def _all_fields(kind: type[msgspec.Struct]) -> set[str]:
    """The key names of a settings class and of the tables in it."""
    names: set[str] = set()
    waiting: list[Any] = [msgspec.inspect.type_info(kind)]
    seen: set[type] = set()
    while waiting:
        info = waiting.pop()
        if isinstance(info, msgspec.inspect.StructType) and info.cls not in seen:
            seen.add(info.cls)
            names.update(field.encode_name for field in info.fields)
            waiting.extend(field.type for field in info.fields)
        elif isinstance(info, msgspec.inspect.UnionType):
            waiting.extend(info.types)
        elif isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
            waiting.append(info.item_type)
        elif isinstance(info, msgspec.inspect.DictType):
            waiting.append(info.value_type)
    return names
