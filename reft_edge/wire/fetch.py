"""Receiving one blob: ask how it is cut, ask for blocks in windows, check, write, finish.

The receiver pulls, so a slow device is never flooded, whoever sends keeps no state, and a restart of either side costs
the blocks on their way. `Fetch` decides what to ask and when; a `Source` knows how asking is done: by messages to the
peer (`PullSource`), or by subscribing to what the broker holds (`wire.broadcast`).

No clock and no threads: `now` is an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Protocol

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import RemoteProtocolError
from reft_edge.wire.blobs import BlobStore, PartFile
from reft_edge.wire.blocks import BLOCK_BYTES, HASH_BYTES, Block, Outline, count_blocks, transfer_name
from reft_edge.wire.messages import BlobOffer, RequestBlocks, TransferMessage, Want

MIN_WINDOW = 2
MAX_WINDOW = 8
"""Blocks asked for at once. On 1 Mbit/s a control message waits 0.8 s behind 2 of them, and 4 s behind 8."""

HASHES_PER_PART = 4096
"""Block hashes in one part of an offer: 44 kB of JSON for 256 MB of blob."""

MIN_RETRY_S = 3.0
MAX_RETRY_S = 60.0
RETRY_ROUND_TRIPS = 4.0
RETRY_GROWTH = 1.5
"""Ask again after max(3 s, 4 round trips), then after 1.5 times longer each time, up to a minute."""

_MAX_RANGES = 64


class Source(Protocol):
    """How to ask for a blob."""

    def ask_offer(self) -> None:
        """Ask how the blob is cut."""

    def ask_blocks(self, indices: Sequence[int]) -> None:
        """Ask for these blocks, which are in rising order."""

    def arrived(self, index: int | None) -> None:
        """A block arrived and is stored; None stands for the whole offer."""

    def close(self) -> None:
        """Nothing more is wanted."""


class PullSource:
    """Asks the peer, by messages."""

    def __init__(self, sha256: str, say: Callable[[TransferMessage], None]) -> None:
        self._sha256 = sha256
        self._say = say

    def ask_offer(self) -> None:
        self._say(Want(sha256=self._sha256))

    def ask_blocks(self, indices: Sequence[int]) -> None:
        self._say(RequestBlocks(transfer=transfer_name(self._sha256), ranges=tuple(to_ranges(indices))))

    def arrived(self, index: int | None) -> None:
        """Nothing to tell: the peer sends what it was asked for, once."""

    def close(self) -> None:
        """Nothing to tell."""


class RoundTrip:
    """Smoothed round trip and the time after which to ask again (after RFC 6298, with a floor and a cap)."""

    def __init__(self) -> None:
        self._smoothed_s: float | None = None
        self.n_timeouts = 0
        """In a row, without anything arriving between them."""

    def sample(self, seconds: float) -> None:
        self._smoothed_s = seconds if self._smoothed_s is None else 0.875 * self._smoothed_s + 0.125 * seconds

    def progressed(self) -> None:
        self.n_timeouts = 0

    def timed_out(self) -> None:
        self.n_timeouts += 1

    @property
    def retry_s(self) -> float:
        first = max(MIN_RETRY_S, RETRY_ROUND_TRIPS * (self._smoothed_s or 0.0))
        return min(MAX_RETRY_S, first * RETRY_GROWTH ** min(self.n_timeouts, 20))


class Fetch:
    """One blob on its way to us. The owner passes in what arrives and calls `time_out` when `retry_at` has passed.

    Raises `ResourceError` from the store when the disk is full or the blob too large.
    """

    def __init__(self, ref: BlobRef, store: BlobStore, source: Source, now: float) -> None:
        self.ref = ref
        self._store = store
        self.source = source
        self._hash_parts: dict[int, bytes] = {}
        self._block_bytes = BLOCK_BYTES
        self._part: PartFile | None = None
        self._refused = False
        """Whether a block came that is not what the offer says: one of the two is wrong, and an offer is not signed."""
        self._asked_at: dict[int, float] = {}
        self._asked_twice: set[int] = set()
        self._window = MIN_WINDOW
        self._window_left = MIN_WINDOW
        self._round_trip = RoundTrip()
        self._offer_asked_at: float | None = None
        self._last_asked_at = now
        self.began_at = now
        self.retry_at = now

    @property
    def whole(self) -> bool:
        """Whether every block is here, and `finish` is due."""
        return self._part is not None and self._part.n_missing == 0

    @property
    def n_blocks_missing(self) -> int | None:
        """None before the offer is here."""
        return None if self._part is None else self._part.n_missing

    def ask(self, now: float) -> None:
        """Ask for what is missing, from the beginning: at the start, after a timeout, after a reconnect.

        Where blocks did not fit the offer, for the offer as well: with a forged one the blob would never be whole. What
        is here stays on disk, and what fits the next offer is not fetched again.
        """
        if self._refused:
            self._forget_offer()
        self._asked_twice.update(self._asked_at)
        self._asked_at.clear()
        self._window = self._window_left = MIN_WINDOW
        if self._part is None:
            self._offer_asked_at = now if self._offer_asked_at is None else float("-inf")
            self.source.ask_offer()
        else:
            self._ask_blocks(now)
        self._last_asked_at = now
        self.retry_at = now + self._round_trip.retry_s

    @property
    def n_timeouts(self) -> int:
        """In a row, without anything arriving between them."""
        return self._round_trip.n_timeouts

    def time_out(self, now: float, other: Source | None = None) -> None:
        """Nothing arrived for too long: ask again, an`other` source if one is given, and wait longer next time."""
        self._round_trip.timed_out()
        if other is None:
            self._ask_again(now)
        else:
            self.change_source(other, now)

    def hurry(self, now: float) -> None:
        """The sender gave a sign of life: do not sit out a long wait."""
        self.retry_at = max(now, min(self.retry_at, self._last_asked_at + MIN_RETRY_S))

    def postpone(self, now: float) -> None:
        """Begin the wait anew, because what was asked for will come by itself."""
        self.retry_at = now + self._round_trip.retry_s

    def change_source(self, source: Source, now: float) -> None:
        """Go on with another source; what is here stays."""
        self.source.close()
        self.source = source
        self._offer_asked_at = None
        self._ask_again(now)

    def take_offer(self, offer: BlobOffer, now: float) -> None:
        """Check one part of the offer and keep it; with the last one, open the part file and ask for blocks.

        Raises `RemoteProtocolError`, and changes nothing, for an offer that does not fit the blob.
        """
        if self._part is not None:
            return  # a repetition
        hashes = self._check_offer(offer)
        if offer.block_bytes != self._block_bytes:
            self._hash_parts.clear()
            self._block_bytes = offer.block_bytes
        self._hash_parts[offer.part] = hashes
        self._round_trip.progressed()
        self.retry_at = now + self._round_trip.retry_s
        if len(self._hash_parts) < offer.parts:
            return
        if self._offer_asked_at is not None and self._offer_asked_at > 0:
            self._round_trip.sample(now - self._offer_asked_at)
        joined = b"".join(self._hash_parts[part] for part in range(offer.parts))
        self._hash_parts.clear()
        outline = Outline(size_bytes=self.ref.size_bytes, hashes=joined, block_bytes=self._block_bytes)
        self._part = self._store.open_part(self.ref, outline)
        self.source.arrived(None)
        self._ask_blocks(now)

    def take_block(self, block: Block, now: float) -> bool:
        """Check and store one block; False for one that is here already or that nobody can place yet.

        Raises `RemoteProtocolError` when it is not what the offer says.
        """
        part = self._part
        if part is None or (block.index < part.outline.n_blocks and part.has(block.index)):
            return False
        if block.index >= part.outline.n_blocks or not part.outline.matches(block.index, block.content):
            self._refused = True
            raise RemoteProtocolError(f"block {block.index} of {self.ref.sha256[:12]}… is not what was offered")
        part.write(block.index, block.content)
        asked_at = self._asked_at.pop(block.index, None)
        if asked_at is not None and block.index not in self._asked_twice:
            self._round_trip.sample(now - asked_at)
        self._round_trip.progressed()
        self.retry_at = now + self._round_trip.retry_s
        self.source.arrived(block.index)
        self._window_left -= 1
        if self._window_left <= 0:
            self._window = self._window_left = min(MAX_WINDOW, self._window + 1)
        self._ask_blocks(now)
        return True

    def finish(self) -> bool:
        """Hash the whole and give it its name; False, and everything starts over, when the hash is another."""
        part = self._part
        if part is None or not part.finish():
            self._part = None
            return False
        self.source.close()
        return True

    def close(self) -> None:
        """Stop; what is here stays on disk for a later fetch."""
        self.source.close()
        self._forget_offer()

    def _ask_again(self, now: float) -> None:
        """Repeated silence to requests may mean that the sender has lost the blob; only `Want` is told so."""
        self.ask(now)
        if self._part is not None and self._round_trip.n_timeouts >= 2:
            self.source.ask_offer()

    def _forget_offer(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None
        self._refused = False

    def _ask_blocks(self, now: float) -> None:
        """Fill the window, once half of it is free: fewer requests, and the sender never runs dry."""
        for index in [index for index, asked_at in self._asked_at.items() if asked_at + self._round_trip.retry_s < now]:
            del self._asked_at[index]  # others came, this one did not: it is lost
            self._asked_twice.add(index)
        room = self._window - len(self._asked_at)
        if self._part is None or room < self._window // 2:
            return
        wanted = self._part.missing(room, skip=self._asked_at)
        if wanted:
            self._asked_at.update(dict.fromkeys(wanted, now))
            self.source.ask_blocks(wanted)

    def _check_offer(self, offer: BlobOffer) -> bytes:
        """The hashes in one part of an offer."""
        n_blocks = count_blocks(self.ref.size_bytes, offer.block_bytes)
        n_parts = max(1, count_blocks(n_blocks, HASHES_PER_PART))
        n_hashes = min(HASHES_PER_PART, n_blocks - offer.part * HASHES_PER_PART)
        try:
            hashes = base64.b64decode(offer.block_hashes, validate=True)
        except ValueError as exc:  # binascii.Error, and text beyond ASCII
            raise RemoteProtocolError(f"offer of {offer.sha256[:12]}… is not base64: {exc}") from exc
        fits = (
            offer.sha256 == self.ref.sha256
            and offer.size_bytes == self.ref.size_bytes
            and offer.block_bytes <= BLOCK_BYTES
            and offer.parts == n_parts
            and offer.part < n_parts
            and len(hashes) == n_hashes * HASH_BYTES
        )
        if not fits:
            raise RemoteProtocolError(f"offer of {offer.sha256[:12]}… does not fit {self.ref.size_bytes} bytes")
        return hashes


def make_offers(sha256: str, outline: Outline) -> list[BlobOffer]:
    """The messages that say how a blob is cut."""
    step = HASHES_PER_PART * HASH_BYTES
    pieces = [outline.hashes[start : start + step] for start in range(0, len(outline.hashes), step)] or [b""]
    return [
        BlobOffer(
            sha256=sha256,
            size_bytes=outline.size_bytes,
            block_bytes=outline.block_bytes,
            transfer=transfer_name(sha256),
            part=number,
            parts=len(pieces),
            block_hashes=base64.b64encode(piece).decode("ascii"),
        )
        for number, piece in enumerate(pieces)
    ]


def to_ranges(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Rising `indices` as (first, count)."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and index == sum(ranges[-1]):
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((index, 1))
    return ranges[:_MAX_RANGES]
