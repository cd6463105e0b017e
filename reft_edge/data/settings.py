"""Where samples come from: the `[data]` table of agent.toml and the public and test tables of federation.toml.

Value object only. Neither numpy nor pillow is loaded here, because the agent's daemon reads settings.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class DataSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of samples: `path` to files, or `function` for anything else.

    `path` is relative to the settings file and names a folder of pictures by class (`<class>/<n>.png`), a folder of
    pictures without classes (unlabelled), an `.npz` file, or a `.csv` file.
    """

    path: str = ""
    function: str = ""
    """`module:function` in a `.py` file beside the settings file (or in an installed module). It takes no arguments and
    returns `inputs`, `(inputs, targets)`, or a dictionary with `inputs` and perhaps `targets`, `classes`, and
    `recordings`: a number for each sample, the same for all that must stay together when some are held out."""
    labelled: bool = True
    """`false`: there are no targets, or they are not to be read (public data to distil on)."""
    classes: tuple[str, ...] = ()
    """Names of the integer labels 0, 1, ... in an `.npz`, in a `.csv` or from a function; pictures have folders."""
    shape: tuple[Annotated[int, Meta(ge=1)], ...] = ()
    """One sample's shape, for example `[3, 32, 32]`; by default what the model takes."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What to do about a picture that cannot be read: stop and name it, or leave it out with a warning."""
    columns: tuple[str, ...] = ()
    """CSV: the feature columns; by default all but the targets."""
    target_column: str | tuple[str, ...] = ""
    """CSV: the column of classes, or the column or columns of numbers to predict."""
    window: Annotated[int, Meta(ge=0)] = 0
    """CSV: this many rows one after another are one sample of shape (columns, window). 0: each row is a sample."""
    stride: Annotated[int, Meta(ge=0)] = 0
    """CSV: rows from one window's start to the next; 0: as many as a window has."""
    holdout_fraction: Annotated[float, Meta(ge=0, le=0.9)] = 0.2
    """Share of a device's samples that is kept from training, to measure what training brought."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.function):
            raise ValueError('data needs either path = "..." or function = "module:function"')
        if self.function and len(self.function.split(":")) != 2:
            raise ValueError(f'function = {self.function!r} is not of the form "module:function"')

    @property
    def target_columns(self) -> tuple[str, ...]:
        if isinstance(self.target_column, str):
            return (self.target_column,) if self.target_column else ()
        return self.target_column
