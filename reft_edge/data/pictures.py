"""A folder of pictures by class, or a folder of pictures without classes.

The folder's name is the class. Pictures become uint8 (channels, height, width); which of them can be read is known only
after reading them all, so a broken one is met here and not in the middle of a round.
"""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from reft_edge.data.dataset import Dataset
from reft_edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from reft_edge.data.settings import DataSettings
    from reft_edge.types import Array

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

MAX_BROKEN_SHARE = 0.1
"""With `broken = "skip"`, more than a tenth unreadable means a wrong folder or a dying card, not a bad picture."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Those of `SUFFIXES`. Pillow knows more, and starts a program for one (EPS)."""

_DECODER_ERRORS = (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
"""What Pillow's decoders raise for damaged files: mostly Python's own."""

logger = logging.getLogger(__name__)


def load_pictures(folder: Path, settings: DataSettings, shape: tuple[int, ...] | None) -> Dataset:
    """All pictures under `folder`: inputs uint8 (n, channels, height, width), targets by class folder.

    `shape` is (channels, height, width), or None when all pictures have one size. Raises `DataError`.
    """
    if shape is not None and (len(shape) != 3 or shape[0] not in _MODES):
        raise DataError(
            f"{folder}: pictures cannot become samples of shape {shape}; expected (1, 3 or 4, height, width)"
        )
    classes, files = list_pictures(folder)
    inputs = np.empty((0,), dtype=np.uint8)
    targets: list[int] = []
    for path, target, picture in read_pictures(folder, files, settings, shape):
        if not targets:
            inputs = np.empty((len(files), *picture.shape), dtype=np.uint8)
        elif picture.shape != inputs.shape[1:]:
            raise DataError(
                f"{path} is {picture.shape} (channels, height, width), others are {inputs.shape[1:]}; set shape"
            )
        inputs[len(targets)] = picture
        targets.append(target)
    labelled = bool(classes) and settings.labelled
    return Dataset(
        inputs=inputs[: len(targets)],
        targets=np.array(targets, dtype=np.int64) if labelled else None,
        classes=classes if labelled else (),
    )


def read_pictures(
    folder: Path, files: Sequence[tuple[Path, int]], settings: DataSettings, shape: tuple[int, ...] | None
) -> Iterator[tuple[Path, int, Array]]:
    """Each readable picture with its class index; broken ones are refused or counted, as the settings say."""
    broken = 0
    for path, target in files:
        try:
            picture = read_picture(path, shape)
        except DataError as exc:
            if settings.broken == "refuse":
                raise DataError(f'{exc}; remove it, or set broken = "skip"') from exc
            logger.warning("%s; left out", exc)
            broken += 1
        else:
            yield path, target, picture
    if broken > MAX_BROKEN_SHARE * len(files):
        raise DataError(f"{folder}: {broken} of {len(files)} pictures cannot be read")


def list_pictures(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names in alphabetic order (empty for a flat folder), and each picture with its class index."""
    entries = sorted(entry for entry in _entries(folder) if not entry.name.startswith("."))
    flat = [(entry, 0) for entry in entries if _is_picture(entry)]
    by_class = [(entry.name, pictures_below(entry)) for entry in entries if entry.is_dir()]
    by_class = [(name, pictures) for name, pictures in by_class if pictures]
    if flat and by_class:
        raise DataError(f"{folder} has pictures and class folders side by side; put every picture in a class folder")
    if not flat and not by_class:
        raise DataError(
            f"{folder} has no pictures; expected <class>/<name>.png (or {', '.join(sorted(SUFFIXES))}); "
            "of recordings name one .csv or .npz file, or a function that reads them all"
        )
    files = [(path, index) for index, (_, pictures) in enumerate(by_class) for path in pictures]
    return tuple(name for name, _ in by_class), flat or files


def read_picture(path: Path, shape: Sequence[int] | None) -> Array:
    """One picture as uint8 (channels, height, width), converted and resized to `shape` if given. Raises `DataError`."""
    return decode_picture(path, shape, called=str(path))


def decode_picture(
    source: Path | BinaryIO,
    shape: Sequence[int] | None,
    *,
    called: str,
    formats: tuple[str, ...] = _FORMATS,
    max_pixels: int | None = None,
) -> Array:
    """`read_picture` of a file that is open, or lies in memory; `called` names it in errors.

    Other `formats`, and more than `max_pixels`, are refused before anything is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source, formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise DataError(f"{called}: the picture has {image.width} x {image.height} pixels; scale it down")
            if shape is not None:
                channels, height, width = shape
            else:
                channels, height, width = 1 if image.mode in ("1", "L", "I;16") else 3, image.height, image.width
            converted = image.convert(_MODES[channels])
            if converted.size != (width, height):
                converted = converted.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(converted, dtype=np.uint8)
    except (*_DECODER_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        reason = "not a picture, or damaged" if isinstance(exc, UnidentifiedImageError) else str(exc)
        raise DataError(f"{called}: the picture cannot be read ({reason})") from exc
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as exc:
        raise DataError(f"{folder} cannot be read: {exc.strerror or exc}") from exc


def pictures_below(folder: Path) -> list[Path]:
    """All pictures of a folder and its subfolders, by name."""
    return sorted(path for path in folder.rglob("*") if _is_picture(path) and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
