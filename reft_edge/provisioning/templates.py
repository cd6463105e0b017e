"""Fills in the files of broker_config/: words between at signs stand for what differs between federations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from reft_edge.data_files import shared_folder
from reft_edge.errors import ConfigError

_PLACE = re.compile(r"@([A-Z_]+)@")


def filled_template(name: str, values: Mapping[str, str]) -> str:
    """The file `name` of broker_config/ with `values` in their places.

    Raises `ConfigError` where the file is missing or has a place that `values` does not fill.
    """
    path = shared_folder("broker_config") / name
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}; install reft-edge again") from exc
    unknown = set(_PLACE.findall(text)) - set(values)
    if unknown:
        raise ConfigError(f"{path} has the place @{min(unknown)}@, which nothing fills; install reft-edge again")
    return _PLACE.sub(lambda place: values[place[1]], text)


def check_path(path: Path) -> Path:
    """Return `path` if it can stand in Mosquitto's configuration, which has no quotes. Raises `ConfigError`."""
    if any(not character.isprintable() for character in str(path)) or str(path) != str(path).strip():
        raise ConfigError(f"the folder {str(path)!r} cannot be named in Mosquitto's configuration; choose another name")
    return path
