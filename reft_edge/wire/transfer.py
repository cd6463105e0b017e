"""Moving blobs between two peers: one `Courier` at each end, which receives what it wants and serves what it has.

    receiver                         sender
    Want(sha256)            ->
                            <-       BlobOffer (parts)            or Gone
    RequestBlocks(ranges)   ->
                            <-       blocks                       repeated until all are here
    Receipt(sha256)         ->

The sender answers from its store and remembers nothing about the receiver. Every message may be lost, repeated or
reordered. Pure logic: the owner passes in payloads, the time and whether there is a connection, sends what the courier
says, and acts on the events. See `wire.fetch` for the receiving side and `wire.broadcast` for one blob to many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import BundleError, LocalProtocolError, RemoteProtocolError, ResourceError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import Block, is_block, pack_block, parse_block, transfer_name
from reft_edge.wire.broadcast import BroadcastSource, SubscribeBlock
from reft_edge.wire.fetch import MAX_WINDOW, Fetch, PullSource, Source, make_offers
from reft_edge.wire.messages import (
    BlobOffer,
    Gone,
    Receipt,
    RequestBlocks,
    TransferMessage,
    Want,
    decode_transfer,
    encode,
)

MAX_PARALLEL_FETCHES = 2
"""Two at once: one finishes (hashing, syncing) while the other keeps the link busy."""

MAX_FETCHES = 64
"""A task names five blobs. More than this many at once is a mistake of ours or a trick of the peer's."""

MAX_WRONG_HASHES = 3
"""A blob whose blocks fit their offer but whose whole hash is wrong is not tried more often than this."""


TURN_S = 60.0
"""While others wait, a fetch goes to the end of the line after this long: a peer that sends a little now and then would
keep its place for ever. What is here of the blob stays, so that taking turns costs a window of blocks."""

WAITING_POLL_S = 0.5
"""A fetch that waits for the limiter looks again this often."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The blob is whole, checked, and in our store."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """The peer has a receipt for a blob of our store."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A fetch has ended without the blob: the peer no longer has it, or it cannot be stored here."""

    sha256: str
    reason: str
    no_room: bool = False
    """It cannot be stored here: the disk refuses, or the blob is too large for the store."""


TransferEvent: TypeAlias = Fetched | Delivered | Lost


@dataclass(slots=True)
class TransferCounters:
    """Payload bytes and blocks of one courier since it was made; MQTT's own few bytes a message are not in it."""

    bytes_up: int = 0
    bytes_down: int = 0
    blocks_sent: int = 0
    blocks_received: int = 0
    duplicates: int = 0
    """Blocks that arrived although they were here: what a lossy link cost."""


class PullLimiter:
    """Shared by the couriers of one process: at most `limit` blobs arrive at once, first come first served.

    This is the coordinator's back-pressure: a hundred devices that finish together wait their turn.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._active: set[object] = set()
        self._waiting: dict[object, None] = {}

    def acquire(self, token: object) -> bool:
        """Whether `token` may run; else it waits in line, and asks again later."""
        if token in self._active:
            return True
        self._waiting.setdefault(token)
        free = self._limit - len(self._active)
        if free <= 0 or token not in list(self._waiting)[:free]:
            return False
        del self._waiting[token]
        self._active.add(token)
        return True

    @property
    def contended(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def release(self, token: object) -> None:
        """Leave the line, or make room. Idempotent."""
        self._active.discard(token)
        self._waiting.pop(token, None)


class Courier:
    """One peer. `send(payload)` puts a payload on its way and may lose it.

    `may_serve(sha256)` says whether the peer may have a blob of the store (default: any). `subscribe_block` and
    `unsubscribe_block`, given both, allow `fetch(..., broadcast=True)`.
    """

    def __init__(
        self,
        store: BlobStore,
        send: Callable[[bytes], None],
        *,
        may_serve: Callable[[str], bool] | None = None,
        subscribe_block: SubscribeBlock | None = None,
        unsubscribe_block: SubscribeBlock | None = None,
        limiter: PullLimiter | None = None,
        max_parallel: int = MAX_PARALLEL_FETCHES,
    ) -> None:
        self._store = store
        self._send = send
        self._may_serve = may_serve
        self._topics = (subscribe_block, unsubscribe_block) if subscribe_block and unsubscribe_block else None
        self._limiter = limiter or PullLimiter(MAX_FETCHES)
        self._max_parallel = max_parallel
        self._waiting: dict[str, tuple[BlobRef, bool]] = {}
        self._active: dict[str, Fetch] = {}
        self._wrong_hashes: dict[str, int] = {}
        self._broadcast: set[str] = set()
        """What the broker may hold."""
        self._connected = False
        self._started_at = 0.0
        self.counters = TransferCounters()

    @property
    def fetching(self) -> frozenset[str]:
        """SHA-256 of what is wanted and not here yet."""
        return frozenset(self._waiting) | frozenset(fetch.ref.sha256 for fetch in self._active.values())

    def fetch(self, ref: BlobRef, now: float, *, broadcast: bool = False) -> list[TransferEvent]:
        """Want a blob. Repeating it does no harm; for a blob that is here the receipt is repeated.

        `broadcast`: first see whether the broker holds it. Raises `LocalProtocolError` beyond `MAX_FETCHES`.
        """
        if self._store.has(ref.sha256):
            self.acknowledge(ref.sha256)
            return [Fetched(ref.sha256)]
        if ref.sha256 in self.fetching:
            if (active := self._active.get(transfer_name(ref.sha256))) is not None:
                active.hurry(now)
            return self.tick(now)
        if len(self._waiting) + len(self._active) >= MAX_FETCHES:
            raise LocalProtocolError(f"more than {MAX_FETCHES} blobs wanted from one peer at once")
        self._waiting[ref.sha256] = (ref, broadcast)
        if broadcast and self._topics is not None:
            self._broadcast.add(ref.sha256)
        return self._start_waiting(now)

    def cancel(self, sha256: str) -> None:
        """No longer want a blob; what is here of it stays for a later fetch. Idempotent."""
        self._waiting.pop(sha256, None)
        self._wrong_hashes.pop(sha256, None)
        self._broadcast.discard(sha256)
        if (fetch := self._active.pop(transfer_name(sha256), None)) is not None:
            fetch.close()
        self._limiter.release((self, sha256))

    def acknowledge(self, sha256: str) -> None:
        """Send a receipt, also for a blob that was used and removed since."""
        self._say(Receipt(sha256=sha256))

    def close(self) -> None:
        """Cancel everything."""
        for sha256 in self.fetching:
            self.cancel(sha256)

    def set_connected(self, connected: bool, now: float) -> list[TransferEvent]:
        """Say whether the peer can be reached. While it cannot, nothing is asked and no slot is held."""
        was, self._connected = self._connected, connected
        if not connected:
            for sha256 in self.fetching:
                self._limiter.release((self, sha256))
        elif not was:
            for fetch in self._active.values():
                if isinstance(fetch.source, BroadcastSource):
                    fetch.postpone(now)  # the link renews its subscriptions, and the broker sends again
                else:
                    fetch.retry_at = now
        return self.tick(now)

    def tick(self, now: float) -> list[TransferEvent]:
        """Ask again for what is overdue, and start what waits."""
        if not self._connected:
            return []
        for transfer, fetch in list(self._active.items()):
            if fetch.retry_at <= now:
                self._retry(transfer, fetch, now)
            elif self._turn_ends_at(fetch) <= now:
                self._limiter.release((self, fetch.ref.sha256))
                self._line_up(transfer, fetch)
        return self._start_waiting(now)

    def next_wakeup(self, now: float) -> float | None:
        """When `tick` is due next, at the earliest now; None while only an arriving payload can change anything."""
        if not self._connected:
            return None
        times = [min(fetch.retry_at, self._turn_ends_at(fetch)) for fetch in self._active.values()]
        if self._waiting and len(self._active) < self._max_parallel:
            times.append(self._started_at + WAITING_POLL_S)  # the limiter has no way to call back
        return max(now, min(times)) if times else None

    def handle(self, payload: bytes, now: float) -> list[TransferEvent]:
        """Take one payload of the peer, or a retained block.

        Raises `RemoteProtocolError`, and changes nothing, for garbage; the caller logs and drops it.
        """
        self.counters.bytes_down += len(payload)
        if is_block(payload):
            return self._handle_block(parse_block(payload), now)
        message = decode_transfer(payload)
        match message:
            case Want(sha256=sha256):
                self._answer_want(sha256)
            case RequestBlocks():
                self._answer_request(message)
            case Receipt(sha256=sha256):
                if self._store.has(sha256):
                    return [Delivered(sha256)]
            case BlobOffer():
                return self._handle_offer(message, now)
            case Gone(sha256=sha256):
                if sha256 in self.fetching:
                    return self._lose(sha256, "the sender no longer has it", now)
        return []

    # Receiving.

    def _start_waiting(self, now: float) -> list[TransferEvent]:
        """Start as many fetches as the limits allow; a blob beyond the store's limit is lost at once."""
        events: list[TransferEvent] = []
        self._started_at = now
        for sha256, (ref, broadcast) in list(self._waiting.items()):
            if not self._connected or len(self._active) >= self._max_parallel:
                break
            try:
                self._store.check_size(ref)
            except ResourceError as exc:
                self.cancel(sha256)
                events.append(Lost(sha256, str(exc), no_room=True))
                continue
            if not self._limiter.acquire((self, sha256)):
                break
            del self._waiting[sha256]
            source: Source = (self._broadcast_source(sha256) if broadcast else None) or self._pull(sha256)
            fetch = Fetch(ref, self._store, source, now)
            self._active[transfer_name(sha256)] = fetch
            fetch.ask(now)
        return events

    def _retry(self, transfer: str, fetch: Fetch, now: float) -> None:
        """A fetch without progress lets others go first, then asks again: the peer if the broker is silent.

        Where the peer stays silent as well, both in turn: it may be away, and the broker may only have been slow.
        """
        token = (self, fetch.ref.sha256)
        self._limiter.release(token)
        if not self._limiter.acquire(token):
            self._line_up(transfer, fetch)
        elif isinstance(fetch.source, BroadcastSource):
            fetch.change_source(self._pull(fetch.ref.sha256), now)
        elif fetch.n_timeouts and (broker := self._broadcast_source(fetch.ref.sha256)) is not None:
            fetch.time_out(now, broker)
        else:
            fetch.time_out(now)

    def _line_up(self, transfer: str, fetch: Fetch) -> None:
        """Let others go first. What is here stays on disk."""
        del self._active[transfer]
        fetch.close()
        self._waiting[fetch.ref.sha256] = (fetch.ref, False)

    def _turn_ends_at(self, fetch: Fetch) -> float:
        return fetch.began_at + TURN_S if self._limiter.contended else float("inf")

    def _handle_offer(self, offer: BlobOffer, now: float) -> list[TransferEvent]:
        fetch = self._active.get(transfer_name(offer.sha256))
        if fetch is None or fetch.ref.sha256 != offer.sha256:
            return []
        try:
            fetch.take_offer(offer, now)
        except ResourceError as exc:
            return self._lose(offer.sha256, str(exc), now, no_room=True)
        return self._finish(fetch, now)

    def _handle_block(self, block: Block, now: float) -> list[TransferEvent]:
        fetch = self._active.get(block.transfer)
        if fetch is None:
            self.counters.duplicates += 1
            return []
        try:
            new = fetch.take_block(block, now)
        except ResourceError as exc:
            return self._lose(fetch.ref.sha256, str(exc), now, no_room=True)
        if not new:
            self.counters.duplicates += 1
            return []
        self.counters.blocks_received += 1
        return self._finish(fetch, now)

    def _finish(self, fetch: Fetch, now: float) -> list[TransferEvent]:
        """When all blocks are here: check, name, receipt, and let the next one start."""
        if not fetch.whole:
            return []
        sha256 = fetch.ref.sha256
        try:
            good = fetch.finish()
        except ResourceError as exc:
            return self._lose(sha256, str(exc), now, no_room=True)
        if not good:
            self._wrong_hashes[sha256] = self._wrong_hashes.get(sha256, 0) + 1
            if self._wrong_hashes[sha256] >= MAX_WRONG_HASHES:
                return self._lose(sha256, "its blocks fit the offer, but the whole is another blob", now)
            fetch.change_source(self._pull(sha256), now)
            return []
        self.cancel(sha256)
        self.acknowledge(sha256)
        return [Fetched(sha256), *self._start_waiting(now)]

    def _lose(self, sha256: str, reason: str, now: float, *, no_room: bool = False) -> list[TransferEvent]:
        self.cancel(sha256)
        return [Lost(sha256, reason, no_room), *self._start_waiting(now)]

    def _pull(self, sha256: str) -> PullSource:
        return PullSource(sha256, self._say)

    def _broadcast_source(self, sha256: str) -> BroadcastSource | None:
        """None where the broker does not hold it, or we cannot ask."""
        if self._topics is None or sha256 not in self._broadcast:
            return None
        return BroadcastSource(sha256, *self._topics)

    # Serving.

    def _answer_want(self, sha256: str) -> None:
        if not self._serves(sha256):
            self._say(Gone(sha256=sha256))
            return
        try:
            outline = self._store.outline(sha256)
        except BundleError:
            self._say(Gone(sha256=sha256))  # removed by another process just now
            return
        for offer in make_offers(sha256, outline):
            self._say(offer)

    def _answer_request(self, request: RequestBlocks) -> None:
        if sum(count for _, count in request.ranges) > MAX_WINDOW:
            raise RemoteProtocolError(f"more than {MAX_WINDOW} blocks asked for at once")
        sha256 = self._store.find(request.transfer)
        if sha256 is None or not self._serves(sha256):
            return  # after a while the receiver asks with Want, and hears that it is gone
        for first, count in request.ranges:
            for index in range(first, first + count):
                content = self._store.read_block(sha256, index)
                if content is None:
                    return
                self.counters.blocks_sent += 1
                self._transmit(pack_block(Block(request.transfer, index, content)))

    def _serves(self, sha256: str) -> bool:
        return self._store.has(sha256) and (self._may_serve is None or self._may_serve(sha256))

    def _say(self, message: TransferMessage) -> None:
        self._transmit(encode(message))

    def _transmit(self, payload: bytes) -> None:
        self.counters.bytes_up += len(payload)
        self._send(payload)
