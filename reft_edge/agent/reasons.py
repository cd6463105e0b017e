"""Reasons as the coordinator is told them: what is wrong, in one line, and not how this device's disk is laid out.

The device's own log has the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reft_edge.errors import one_line

_BELOW = r"(?:[^\s/:;,'\"()]+/)"
_FOLDERS = re.compile(rf"(?<![\w.:/])/{_BELOW}+")
"""Of an absolute path, all but its last name. Not of an address, whose slashes come after a colon."""


def for_coordinator(reason: str, folders: Iterable[Path]) -> str:
    """`reason` with paths cut to their last names. `folders`: the device's own, whose names may have blanks in them."""
    for folder in sorted(map(str, folders), key=len, reverse=True):
        reason = re.sub(rf"{re.escape(folder)}/{_BELOW}*", "", reason)
    return one_line(_FOLDERS.sub("", reason)).strip()
