"""One blob for many devices: the broker holds its blocks.

The coordinator publishes the offer and each block once, retained, on `blob/<transfer>/offer` and
`blob/<transfer>/<index>`. A device asks by subscribing to the next few topics and unsubscribes as they arrive. So a
device can fetch while the coordinator is down, and a blob for a hundred devices leaves the coordinator once.

A broker that lost its memory is seeded again; until then devices fall back to asking the coordinator. Above
`MAX_BROADCAST_BYTES` the broker's memory is worth more than the coordinator's bandwidth, and devices pull.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import LocalProtocolError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import Block, pack_block, transfer_name
from reft_edge.wire.fetch import make_offers
from reft_edge.wire.messages import encode

MAX_BROADCAST_BYTES = 32 * 2**20
"""32 MiB: 512 blocks, so that the offer is one message."""

MAX_REMEMBERED = 32
"""Cleared blobs that are cleared again: a broker writes to its disk every half minute or so, a round clears a few."""

OFFER = "offer"
"""Stands in place of a block's index in the topic of the offer."""

SubscribeBlock: TypeAlias = Callable[[str, str], None]
"""Given transfer and index (or `OFFER`), subscribe to that topic at QoS 0, or unsubscribe from it.

Not at QoS 1: after a cut, a broker that remembers the session redelivers what was on its way, and sends the retained
blocks for the renewed subscriptions as well, so that the whole window would travel twice (7 blocks a cut instead of 2).
"""

PublishRetained: TypeAlias = Callable[[str, str, bytes], bool]
"""Given transfer, index (or `OFFER`) and payload, publish retained at QoS 1; False when the queue is full."""


def may_broadcast(ref: BlobRef) -> bool:
    return ref.size_bytes <= MAX_BROADCAST_BYTES


class BroadcastSource:
    """Device side: asking means subscribing. A `wire.fetch.Source`."""

    def __init__(self, sha256: str, subscribe: SubscribeBlock, unsubscribe: SubscribeBlock) -> None:
        self._transfer = transfer_name(sha256)
        self._subscribe = subscribe
        self._unsubscribe = unsubscribe
        self._open: set[str] = set()

    def ask_offer(self) -> None:
        self._ask(OFFER)

    def ask_blocks(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._ask(str(index))

    def arrived(self, index: int | None) -> None:
        self._drop(OFFER if index is None else str(index))

    def close(self) -> None:
        for name in sorted(self._open):
            self._drop(name)

    def _ask(self, name: str) -> None:
        if name not in self._open:
            self._open.add(name)
            self._subscribe(self._transfer, name)

    def _drop(self, name: str) -> None:
        if name in self._open:
            self._open.remove(name)
            self._unsubscribe(self._transfer, name)


class Broadcaster:
    """Coordinator side: seeds and clears blobs, a few messages at a time, so that the send queue stays short.

    Keeps no record on disk: the coordinator adds what its open tasks need after a start, and clears what they no
    longer need. Seeding twice does no harm.
    """

    def __init__(self, store: BlobStore, publish: PublishRetained) -> None:
        self._store = store
        self._publish = publish
        self._held: dict[str, int] = {}
        """SHA-256 -> number of blocks, of every blob that the broker should hold."""
        self._cleared: dict[str, int] = {}
        """The same of blobs that it should hold no more, the latest last."""
        self._waiting: deque[tuple[str, str, int]] = deque()
        """(SHA-256, "offer" | "block" | "clear", index) still to be published."""

    @property
    def held(self) -> frozenset[str]:
        """SHA-256 of the blobs that the broker holds or is about to."""
        return frozenset(self._held)

    @property
    def idle(self) -> bool:
        return not self._waiting

    def seed(self, ref: BlobRef) -> None:
        """Have the broker hold a blob of our store. Raises `BundleError` when it is not there."""
        if not may_broadcast(ref):
            raise LocalProtocolError(f"{ref.size_bytes} bytes are too many to broadcast; check may_broadcast first")
        if ref.sha256 not in self._held:
            self._held[ref.sha256] = self._store.outline(ref.sha256).n_blocks
            self._cleared.pop(ref.sha256, None)
            self._enqueue(ref.sha256)

    def clear(self, sha256: str, n_blocks: int | None = None) -> None:
        """Have the broker forget a blob; `n_blocks` is needed for one that an earlier process seeded."""
        count = self._held.pop(sha256, n_blocks)
        if count is None:
            return
        self._cleared.pop(sha256, None)
        self._cleared[sha256] = count
        if len(self._cleared) > MAX_REMEMBERED:
            del self._cleared[next(iter(self._cleared))]
        self._enqueue_clearing(sha256, count)

    def clear_again(self) -> None:
        """The broker may have been killed and come back with what it had long ago: clear what was cleared since."""
        for sha256, count in self._cleared.items():
            self._enqueue_clearing(sha256, count)

    def seed_again(self) -> None:
        """The broker lost its memory, or may have: publish everything it should hold."""
        self._waiting = deque(item for item in self._waiting if item[1].startswith("clear"))
        for sha256 in self._held:
            self._enqueue(sha256)

    def step(self, max_messages: int) -> int:
        """Publish up to `max_messages`; returns how many. Call it while the send queue is short."""
        done = 0
        while done < max_messages and self._waiting:
            sha256, kind, index = self._waiting[0]
            name = OFFER if kind.endswith("offer") else str(index)
            payload = self._payload(sha256, kind, index)
            if payload is not None and not self._publish(transfer_name(sha256), name, payload):
                break
            self._waiting.popleft()
            done += 1
        return done

    def _enqueue(self, sha256: str) -> None:
        self._waiting.append((sha256, "offer", 0))
        self._waiting.extend((sha256, "block", index) for index in range(self._held[sha256]))

    def _enqueue_clearing(self, sha256: str, count: int) -> None:
        self._waiting = deque(item for item in self._waiting if item[0] != sha256)
        self._waiting.append((sha256, "clear offer", 0))
        self._waiting.extend((sha256, "clear", index) for index in range(count))

    def _payload(self, sha256: str, kind: str, index: int) -> bytes | None:
        """What to publish; empty clears a retained message; None when the blob has gone from the store."""
        if kind.startswith("clear"):
            return b""
        if not self._store.has(sha256):
            return None
        if kind == "offer":
            return encode(make_offers(sha256, self._store.outline(sha256))[0])
        content = self._store.read_block(sha256, index)
        return None if content is None else pack_block(Block(transfer_name(sha256), index, content))
