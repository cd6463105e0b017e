"""`[rejection]`: what happens to updates that are of no use, and to devices that keep sending them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class RejectionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values and defaults only."""

    quarantine_after: Annotated[int, Meta(ge=0, le=1000)] = 3
    """Tasks in a row whose updates were rejected, in whatever runs, after which a device gets no more tasks until a
    person lifts it (`reft-edge quarantine`). 0: never. One bad update may be a power cut at the wrong moment; three
    are a broken board, broken data or somebody's intent."""
    keep_updates: Annotated[int, Meta(ge=0, le=100_000)] = 100
    """Rejected updates that are kept for a person to look at; the oldest go first."""
    keep_bytes: Annotated[int, Meta(ge=0)] = 256 * 2**20
    """What they may take of the disk together."""
