"""Transfers over a network that loses, repeats, reorders and delays, as a deterministic simulation."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import LocalProtocolError, RemoteProtocolError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import BLOCK_BYTES, Block, pack_block, transfer_name
from reft_edge.wire.broadcast import Broadcaster
from reft_edge.wire.fetch import MAX_RETRY_S, make_offers
from reft_edge.wire.messages import BlobOffer, Receipt, RequestBlocks, Want, decode_transfer, encode
from reft_edge.wire.transfer import TURN_S, Courier, Delivered, Fetched, Lost, PullLimiter, TransferEvent


class Network:
    """Two or more couriers and a seeded network between them. Time is simulated."""

    def __init__(self, seed: int, *, loss: float = 0.0, repeat: float = 0.0, delay_s: float = 0.05) -> None:
        self.rng = random.Random(seed)
        self.loss, self.repeat, self.delay_s = loss, repeat, delay_s
        self.now = 100.0
        self.couriers: dict[str, Courier] = {}
        self.events: dict[str, list[TransferEvent]] = {}
        self._queue: list[tuple[float, int, str, bytes]] = []
        self._n = 0
        self.retained: dict[tuple[str, str], bytes] = {}
        self.subscribed: set[tuple[str, str, str]] = set()

    def add(self, name: str, store: BlobStore, peer: str, **options: object) -> Courier:
        courier = Courier(store, lambda payload: self._put(peer, payload), **options)  # type: ignore[arg-type]
        self.couriers[name] = courier
        self.events.setdefault(name, [])
        self.take(name, courier.set_connected(True, self.now))
        return courier

    def take(self, name: str, events: list[TransferEvent]) -> None:
        self.events[name] += events

    def subscribe(self, name: str, transfer: str, index: str) -> None:
        self.subscribed.add((name, transfer, index))
        if (payload := self.retained.get((transfer, index))) is not None:
            self._put(name, payload)

    def unsubscribe(self, name: str, transfer: str, index: str) -> None:
        self.subscribed.discard((name, transfer, index))

    def publish_retained(self, transfer: str, index: str, payload: bytes) -> bool:
        self.retained[transfer, index] = payload
        if not payload:
            del self.retained[transfer, index]
        return True

    def _put(self, name: str, payload: bytes) -> None:
        if self.rng.random() < self.loss:
            return
        for _ in range(2 if self.rng.random() < self.repeat else 1):
            self._n += 1
            arrival = self.now + self.rng.uniform(0.2, 1.8) * self.delay_s
            heapq.heappush(self._queue, (arrival, self._n, name, payload))

    def run(self, until: Callable[[], bool], limit_s: float = 3600.0) -> None:
        """Advance from event to event until the condition holds."""
        end = self.now + limit_s
        while not until():
            times = [(courier.next_wakeup(self.now), name) for name, courier in self.couriers.items()]
            due = min(((at, name) for at, name in times if at is not None), default=None)
            if self._queue and (due is None or self._queue[0][0] <= due[0]):
                at, _, name, payload = heapq.heappop(self._queue)
                self.now = max(self.now, at)
                if name in self.couriers:
                    self.take(name, self.couriers[name].handle(payload, self.now))
            else:
                assert due is not None, "nothing will ever happen again"
                self.now = max(self.now, due[0])
                self.take(due[1], self.couriers[due[1]].tick(self.now))
            assert self.now < end, "it takes too long"


def blob(n_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(n_bytes)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[BlobStore, BlobStore]:
    return BlobStore(tmp_path / "sender"), BlobStore(tmp_path / "receiver")


@pytest.mark.parametrize("n_bytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 1_000_000])
@pytest.mark.parametrize(
    ("loss", "repeat"), [(0.0, 0.0), (0.3, 0.0), (0.1, 0.5)], ids=["quiet", "lossy", "lossy and repeating"]
)
def test_a_blob_arrives_whole_whatever_the_network_does(
    stores: tuple[BlobStore, BlobStore], n_bytes: int, loss: float, repeat: float
) -> None:
    sender, receiver = stores
    ref = sender.put(blob(n_bytes))
    network = Network(n_bytes + 1, loss=loss, repeat=repeat)
    network.add("sender", sender, "receiver")
    device = network.add("receiver", receiver, "sender")
    network.take("receiver", device.fetch(ref, network.now))
    network.run(lambda: Fetched(ref.sha256) in network.events["receiver"])
    assert receiver.read(ref) == blob(n_bytes)
    assert network.events["receiver"] == [Fetched(ref.sha256)]
    while Delivered(ref.sha256) not in network.events["sender"]:  # the offer is repeated until the receipt gets through
        assert device.fetch(ref, network.now) == [Fetched(ref.sha256)]
        network.run(lambda: not network._queue)
    assert device.fetching == frozenset()
    if loss == repeat == 0:
        assert device.counters.duplicates == 0
        assert device.counters.blocks_received == -(-n_bytes // BLOCK_BYTES)


@pytest.mark.parametrize("restarted", ["sender", "receiver"])
def test_a_restart_in_the_middle_costs_only_the_blocks_on_their_way(
    stores: tuple[BlobStore, BlobStore], restarted: str
) -> None:
    ref = stores[0].put(blob(40 * BLOCK_BYTES))
    network = Network(5)
    network.add("sender", stores[0], "receiver")
    network.take("receiver", network.add("receiver", stores[1], "sender").fetch(ref, network.now))
    network.run(lambda: network.couriers["receiver"].counters.blocks_received == 20)
    network._queue.clear()
    before = network.couriers["receiver"].counters.blocks_received
    if restarted == "sender":
        network.add("sender", BlobStore(stores[0].root), "receiver")
    else:
        network.couriers["receiver"].close()
        before = 0
        device = network.add("receiver", BlobStore(stores[1].root), "sender")
        network.take("receiver", device.fetch(ref, network.now))
    network.run(lambda: Fetched(ref.sha256) in network.events["receiver"])
    assert network.couriers["receiver"].counters.blocks_received - before == 20
    assert stores[1].read(ref) == blob(40 * BLOCK_BYTES)


def test_a_cut_of_the_connection_costs_no_duplicate_and_nothing_is_asked_meanwhile(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    ref = stores[0].put(blob(30 * BLOCK_BYTES))
    network = Network(6)
    network.add("sender", stores[0], "receiver")
    device = network.add("receiver", stores[1], "sender")
    device.fetch(ref, network.now)
    network.run(lambda: device.counters.blocks_received == 10)
    device.set_connected(False, network.now)
    network._queue.clear()  # QoS 0: what was on its way is lost
    sent = device.counters.bytes_up
    assert device.next_wakeup(network.now) is None
    network.now += 40.0
    assert device.tick(network.now) == []
    assert device.counters.bytes_up == sent
    device.set_connected(True, network.now)
    network.run(lambda: Fetched(ref.sha256) in network.events["receiver"], limit_s=5.0)
    assert device.counters.duplicates == 0


def test_asking_into_the_void_slows_down_to_a_minute_and_a_sign_of_life_speeds_it_up(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    sent: list[bytes] = []
    device = Courier(stores[1], sent.append)
    device.set_connected(True, 0.0)
    ref = BlobRef(sha256="a" * 64, size_bytes=10)
    device.fetch(ref, 0.0)
    times = [0.0]
    for _ in range(12):
        at = device.next_wakeup(times[-1])
        assert at is not None
        device.tick(at)
        times.append(at)
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert waits[0] == pytest.approx(3.0)
    assert all(after == pytest.approx(min(MAX_RETRY_S, 1.5 * before)) for before, after in itertools.pairwise(waits))
    assert len(sent) == 13
    device.fetch(ref, times[-1] + 10.0)
    assert len(sent) == 14


def test_what_the_sender_does_not_have_or_may_not_give_is_lost_with_a_reason(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    secret = stores[0].put(b"another device's update")
    missing = BlobRef(sha256="b" * 64, size_bytes=5)
    big = BlobRef(sha256="c" * 64, size_bytes=2**40)
    network = Network(7)
    network.add("sender", stores[0], "receiver", may_serve=lambda sha256: sha256 != secret.sha256)
    device = network.add("receiver", stores[1], "sender")
    for ref in (secret, missing, big):
        network.take("receiver", device.fetch(ref, network.now))
    network.run(lambda: len(network.events["receiver"]) == 3)
    lost = {event.sha256: event for event in network.events["receiver"] if isinstance(event, Lost)}
    assert "no longer has it" in lost[secret.sha256].reason
    assert "no longer has it" in lost[missing.sha256].reason
    assert "at most" in lost[big.sha256].reason
    assert [lost[ref.sha256].no_room for ref in (secret, missing, big)] == [False, False, True]
    assert device.fetching == frozenset()


def test_a_blob_that_vanishes_at_the_sender_in_the_middle_is_lost(stores: tuple[BlobStore, BlobStore]) -> None:
    ref = stores[0].put(blob(30 * BLOCK_BYTES))
    network = Network(8)
    network.add("sender", stores[0], "receiver")
    device = network.add("receiver", stores[1], "sender")
    device.fetch(ref, network.now)
    network.run(lambda: device.counters.blocks_received == 10)
    stores[0].remove(ref.sha256)
    network.run(lambda: len(network.events["receiver"]) == 1)
    assert isinstance(network.events["receiver"][0], Lost)


def test_a_full_disk_ends_the_fetch_and_not_the_process(
    stores: tuple[BlobStore, BlobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_edge.wire.blobs.RESERVED_FREE_BYTES", 2**60)
    ref = stores[0].put(blob(BLOCK_BYTES))
    network = Network(9)
    network.add("sender", stores[0], "receiver")
    device = network.add("receiver", stores[1], "sender")
    network.take("receiver", device.fetch(ref, network.now))
    network.run(lambda: bool(network.events["receiver"]))
    (event,) = network.events["receiver"]
    assert isinstance(event, Lost)
    assert "no room" in event.reason
    assert event.no_room


def test_blocks_that_fit_a_lying_offer_do_not_make_a_blob(stores: tuple[BlobStore, BlobStore]) -> None:
    wanted = BlobRef(sha256="d" * 64, size_bytes=100)
    lie = stores[0].put(blob(100))
    sent: list[bytes] = []
    device = Courier(stores[1], sent.append)
    device.set_connected(True, 0.0)
    device.fetch(wanted, 0.0)
    offer = make_offers(wanted.sha256, stores[0].outline(lie.sha256))[0]
    events: list[TransferEvent] = []
    for _ in range(10):
        events += device.handle(encode(offer), 0.0)
        events += device.handle(pack_block(Block(transfer_name(wanted.sha256), 0, blob(100))), 0.0)
    (event,) = events
    assert isinstance(event, Lost)
    assert list(stores[1].root.iterdir()) == []


def test_a_forged_offer_costs_time_and_not_the_blob(stores: tuple[BlobStore, BlobStore]) -> None:
    data = blob(20 * BLOCK_BYTES)
    ref = stores[0].put(data)
    half_right = stores[0].put(data[: 8 * BLOCK_BYTES] + bytes(12 * BLOCK_BYTES))
    (forged,) = make_offers(ref.sha256, stores[0].outline(half_right.sha256))
    network = Network(14)
    sender = network.add("sender", stores[0], "receiver")
    receiver = network.add("receiver", stores[1], "sender")
    receiver.fetch(ref, network.now)
    receiver.handle(encode(forged), network.now)  # what anybody who reaches our topic may say
    refused = 0
    while network.events["receiver"] != [Fetched(ref.sha256)]:
        try:
            network.run(lambda: network.events["receiver"] == [Fetched(ref.sha256)], limit_s=60.0)
        except RemoteProtocolError:
            refused += 1
    assert stores[1].read(ref) == data
    assert refused > 0
    assert sender.counters.blocks_sent <= 20 + refused


def test_garbage_is_refused_and_changes_nothing(stores: tuple[BlobStore, BlobStore]) -> None:
    ref = stores[0].put(blob(3 * BLOCK_BYTES))
    offer = make_offers(ref.sha256, stores[0].outline(ref.sha256))[0]
    assert isinstance(offer, BlobOffer)
    good = pack_block(Block(offer.transfer, 0, blob(3 * BLOCK_BYTES)[:BLOCK_BYTES]))
    sent: list[bytes] = []
    device = Courier(stores[1], sent.append)
    device.set_connected(True, 0.0)
    device.fetch(ref, 0.0)
    bad_offers = [
        replace_offer(offer, size_bytes=1),
        replace_offer(offer, block_bytes=1024),
        replace_offer(offer, parts=4000),
        replace_offer(offer, part=5),
        replace_offer(offer, block_hashes="AAAA"),
        replace_offer(offer, block_hashes="not base64"),
    ]
    for payload in (b"", b"{", b'{"type":"offer"}', b"\xff" * 30, b"[1]", *map(encode, bad_offers)):
        with pytest.raises(RemoteProtocolError):
            device.handle(payload, 0.0)
    device.handle(encode(offer), 0.0)
    wrong = pack_block(Block(offer.transfer, 0, bytes(BLOCK_BYTES)))
    beyond = pack_block(Block(offer.transfer, 3, b"x"))
    for payload in (good[:-1], good[:19], good[:50] + b"\0" + good[51:], wrong, beyond, good + b"x"):
        with pytest.raises(RemoteProtocolError):
            device.handle(payload, 0.0)
    assert device.counters.blocks_received == 0
    assert device.handle(good, 0.0) == []
    assert device.counters.blocks_received == 1


def replace_offer(offer: BlobOffer, **changes: object) -> BlobOffer:
    fields = {name: getattr(offer, name) for name in offer.__struct_fields__}
    return BlobOffer(**{**fields, **changes})


def test_a_peer_cannot_make_us_send_more_than_a_window_or_keep_unasked_blobs(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    ref = stores[0].put(blob(20 * BLOCK_BYTES))
    transfer = transfer_name(ref.sha256)
    sent: list[bytes] = []
    courier = Courier(stores[0], sent.append)
    with pytest.raises(RemoteProtocolError):
        courier.handle(encode(RequestBlocks(transfer=transfer, ranges=((0, 2**50),))), 0.0)
    courier.handle(encode(RequestBlocks(transfer=transfer, ranges=((19, 5), (2**52, 2)))), 0.0)
    courier.handle(encode(RequestBlocks(transfer="0" * 16, ranges=((0, 1),))), 0.0)
    assert courier.counters.blocks_sent == 1
    assert courier.handle(encode(Receipt(sha256="e" * 64)), 0.0) == []
    assert courier.handle(encode(make_offers(ref.sha256, stores[0].outline(ref.sha256))[0]), 0.0) == []
    courier.handle(encode(Want(sha256="e" * 64)), 0.0)
    assert courier.fetching == frozenset()
    for number in range(64):
        courier.fetch(BlobRef(sha256=f"{number:064x}", size_bytes=1), 0.0)
    with pytest.raises(LocalProtocolError):
        courier.fetch(BlobRef(sha256=f"{64:064x}", size_bytes=1), 0.0)


def test_the_limiter_lets_a_few_pull_at_once_and_a_silent_device_does_not_block_the_others(tmp_path: Path) -> None:
    network = Network(10)
    limiter = PullLimiter(2)
    coordinator = BlobStore(tmp_path / "coordinator")
    refs: dict[str, BlobRef] = {}
    for number in range(6):
        device = BlobStore(tmp_path / f"device{number}")
        refs[f"for{number}"] = device.put(blob(300_000, number))
        network.add(f"for{number}", coordinator, f"device{number}", limiter=limiter)
        network.add(f"device{number}", device, f"for{number}")
    del network.couriers["device0"], network.couriers["device1"]  # silent, and first in line
    for name, ref in refs.items():
        network.take(name, network.couriers[name].fetch(ref, network.now))
    network.run(lambda: all(network.events[f"for{number}"] for number in range(2, 6)))
    assert all(network.events[f"for{number}"] == [Fetched(refs[f"for{number}"].sha256)] for number in range(2, 6))


def test_a_device_that_dribbles_takes_turns_with_those_that_wait(tmp_path: Path) -> None:
    network = Network(12)
    limiter = PullLimiter(1)
    coordinator, device = BlobStore(tmp_path / "coordinator"), BlobStore(tmp_path / "device")
    ref, slow = device.put(blob(300_000)), blob(1_000 * BLOCK_BYTES, 1)
    slow_ref = BlobRef(sha256=hashlib.sha256(slow).hexdigest(), size_bytes=len(slow))
    asked: list[bytes] = []
    dribbling = Courier(coordinator, asked.append, limiter=limiter)
    dribbling.set_connected(True, network.now)
    network.add("honest", coordinator, "device", limiter=limiter)
    network.add("device", device, "honest")
    dribbling.fetch(slow_ref, network.now)
    network.take("honest", network.couriers["honest"].fetch(ref, network.now))
    outline = BlobStore(tmp_path / "attacker")
    outline.put(slow)
    (offer,) = make_offers(slow_ref.sha256, outline.outline(slow_ref.sha256))
    began = network.now
    for index in range(1_000):  # a block whenever our patience is nearly at its end
        if asked and decode_transfer(asked[-1]) == Want(sha256=slow_ref.sha256):
            dribbling.handle(encode(offer), network.now)
        piece = slow[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        dribbling.handle(pack_block(Block(transfer_name(slow_ref.sha256), index, piece)), network.now)
        network.now += 2.5
        dribbling.tick(network.now)
        network.take("honest", network.couriers["honest"].tick(network.now))
        if network.couriers["honest"].counters.bytes_up:
            break
    network.run(lambda: network.events["honest"] == [Fetched(ref.sha256)], limit_s=30.0)
    assert network.now - began < 2 * TURN_S
    assert slow_ref.sha256 in dribbling.fetching, "it goes on when its turn comes again"


def subscribing(network: Network, name: str, store: BlobStore, peer: str) -> Courier:
    return network.add(
        name,
        store,
        peer,
        subscribe_block=lambda transfer, index: network.subscribe(name, transfer, index),
        unsubscribe_block=lambda transfer, index: network.unsubscribe(name, transfer, index),
    )


def test_a_broadcast_blob_is_fetched_while_the_coordinator_is_down(stores: tuple[BlobStore, BlobStore]) -> None:
    ref = stores[0].put(blob(1_000_000))
    network = Network(11)
    broadcaster = Broadcaster(stores[0], network.publish_retained)
    broadcaster.seed(ref)
    while not broadcaster.idle:
        assert 0 < broadcaster.step(3) <= 3
    device = subscribing(network, "device", stores[1], "nobody")
    device.fetch(ref, network.now, broadcast=True)
    network.run(lambda: network.events["device"] == [Fetched(ref.sha256)], limit_s=5.0)
    assert network.subscribed == set()
    assert device.counters.blocks_received == len(network.retained) - 1 == 16
    broadcaster.clear(ref.sha256)
    while not broadcaster.idle:
        broadcaster.step(100)
    assert network.retained == {}


def test_a_broker_that_is_late_is_asked_again_while_the_coordinator_is_down(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    ref = stores[0].put(blob(1_000_000))
    network = Network(15)
    device = subscribing(network, "device", stores[1], "nobody")
    device.fetch(ref, network.now, broadcast=True)
    late = network.now + 20
    network.run(lambda: network.now > late)
    broadcaster = Broadcaster(stores[0], network.publish_retained)
    broadcaster.seed(ref)
    broadcaster.step(1000)
    network.run(lambda: network.events["device"] == [Fetched(ref.sha256)], limit_s=150.0)
    assert network.subscribed == set()


def test_a_blob_that_broker_and_coordinator_have_lost_in_the_middle_is_lost(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    ref = stores[0].put(blob(30 * BLOCK_BYTES))
    network = Network(16)
    broadcaster = Broadcaster(stores[0], network.publish_retained)
    broadcaster.seed(ref)
    broadcaster.step(1000)
    network.add("coordinator", stores[0], "device")
    device = subscribing(network, "device", stores[1], "coordinator")
    device.fetch(ref, network.now, broadcast=True)
    network.run(lambda: device.counters.blocks_received == 10)
    network.retained.clear()
    stores[0].remove(ref.sha256)
    network.run(lambda: bool(network.events["device"]), limit_s=150.0)
    assert isinstance(network.events["device"][0], Lost)
    assert network.subscribed == set()


def test_a_broadcast_that_the_broker_has_lost_is_pulled_from_the_peer(stores: tuple[BlobStore, BlobStore]) -> None:
    ref = stores[0].put(blob(1_000_000))
    network = Network(12, loss=0.05)
    broadcaster = Broadcaster(stores[0], network.publish_retained)
    broadcaster.seed(ref)
    broadcaster.step(1000)
    for index in range(8, 16):
        del network.retained[transfer_name(ref.sha256), str(index)]
    network.add("coordinator", stores[0], "device")
    device = subscribing(network, "device", stores[1], "coordinator")
    device.fetch(ref, network.now, broadcast=True)
    network.run(lambda: network.events["device"] == [Fetched(ref.sha256)])
    assert network.subscribed == set()
    assert 8 <= network.couriers["coordinator"].counters.blocks_sent <= 16


def test_a_broker_that_comes_back_with_what_was_cleared_is_cleared_again(stores: tuple[BlobStore, BlobStore]) -> None:
    old, current = stores[0].put(blob(200_000, seed=1)), stores[0].put(blob(200_000, seed=2))
    network = Network(13)
    broadcaster = Broadcaster(stores[0], network.publish_retained)
    broadcaster.seed(old)
    broadcaster.seed(current)
    broadcaster.step(1000)
    long_ago = dict(network.retained)
    broadcaster.clear(old.sha256)
    broadcaster.clear(current.sha256)
    broadcaster.seed(current)
    broadcaster.step(1000)
    network.retained |= long_ago
    broadcaster.clear_again()
    broadcaster.step(1000)
    assert {transfer for transfer, _ in network.retained} == {transfer_name(current.sha256)}


def test_outlines_of_large_blobs_travel_in_parts_and_are_put_together_in_any_order(
    stores: tuple[BlobStore, BlobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_edge.wire.fetch.HASHES_PER_PART", 4)
    ref = stores[0].put(blob(10 * BLOCK_BYTES + 7))
    network = Network(13, loss=0.2, repeat=0.2)
    network.add("sender", stores[0], "receiver")
    device = network.add("receiver", stores[1], "sender")
    assert [offer.parts for offer in make_offers(ref.sha256, stores[0].outline(ref.sha256))] == [3, 3, 3]
    device.fetch(ref, network.now)
    network.run(lambda: network.events["receiver"] == [Fetched(ref.sha256)])
    assert stores[1].read(ref) == blob(10 * BLOCK_BYTES + 7)
