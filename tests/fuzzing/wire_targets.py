"""Targets for what comes from the broker: control messages, signatures, blocks, transfers, topics."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire import blocks, deployment, messages, signing, topics
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import BLOCK_BYTES, Block, Outline
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.fetch import make_offers
from reft_edge.wire.transfer import MAX_FETCHES, Courier, Delivered, Fetched, Lost
from tests.fuzzing.harness import Choices, Target
from tests.fuzzing.mutation import NUMBERS

ROOT = Path(__file__).resolve().parents[2]

MESSAGE_MEMORY_BYTES = 8 * 2**20
"""A message of 96 KiB: a list of short strings becomes objects of some 50 bytes for each byte."""

TRANSFER_MEMORY_BYTES = 4 * 2**20
"""Blocks and offers are handled one at a time."""

SHA256 = hashlib.sha256(b"blob").hexdigest()
BLOB = BlobRef(sha256=SHA256, size_bytes=200_000)
PROFILE = DeviceProfile.read(ROOT / "device_profiles" / "raspberry-pi-4b.toml")
TOPIC = topics.device_topic("fed", "pi", "profile")

TASK = messages.Task(
    task="r1-abc",
    round=1,
    run="run1",
    bundle=BLOB,
    weights=messages.WeightsRef(blob=BLOB, codec=Int8()),
    plan=messages.TrainingPlan(local_epochs=1, batch_size=32, learning_rate=0.1, seed=1),
    deadline=1e9,
    classes=("cat", "dog"),
    broadcast=True,
)
MEASURED = messages.Measured(download_s=0.5, start_s=1.0, training_s=2.5, steps=10, peak_memory_bytes=10**8)
DONE = messages.Done(
    task="r1-abc",
    round=1,
    update=messages.UpdateManifest(blob=BLOB, codec=Int8(), training_samples=100, loss_first=2.0, loss_last=1.5),
    measured=MEASURED,
)
ANNOUNCEMENT = messages.ProfileAnnouncement(
    profile=PROFILE, training_samples=100, holdout_samples=20, input_shape=(3, 32, 32), n_classes=10
)
REPORTS: tuple[messages.Report, ...] = (
    messages.Accepted(task="r1-abc"),
    messages.Refused(task="r1-abc", reason="on battery"),
    messages.Progress(task="r1-abc", state="training", steps_done=1, steps_total=9, loss=1.5),
    messages.Failed(task="r1-abc", kind="out_of_memory", reason="killed by the kernel"),
    DONE,
)
DEPLOY = deployment.Deploy(
    deployment="d1",
    version="run1",
    model="variant-0.50",
    files=tuple(
        deployment.ModelFile(blob=BLOB, size_bytes=300_000, precision=precision, test_metric=0.9)
        for precision in ("float32", "int8")
    ),
    rules=deployment.HealthRules(max_latency_s=0.05, min_accuracy=0.8),
    classes=("cat", "dog"),
    broadcast=True,
    sequence=7,
)
SERVED = deployment.Served(deployment="d1", version="run1", model="variant-0.50", precision="int8", sha256=SHA256)
CONDITION = deployment.Condition(
    serving=SERVED,
    previous=SERVED,
    attempt=deployment.Attempt(
        deployment="d1",
        model="variant-0.50",
        state="serving",
        health=(
            deployment.Health(
                precision="int8",
                holdout_samples=120,
                metric=0.9,
                metric_before=0.8,
                latency_p50_s=0.01,
                latency_p95_s=0.02,
                latency_p99_s=0.03,
                peak_memory_bytes=10**8,
            ),
        ),
    ),
    counts=deployment.PredictionCounts(version="run1", predictions=3, classes=(1, 2), confidence=(0, 3)),
    vitals=deployment.Vitals(temperature_celsius=50.5, throttled=False, battery_share=0.5, on_battery=True),
)


# Control messages.


def message_targets() -> list[Target]:
    """One for each decoder. What is accepted can be encoded again, and means the same then."""
    kinds: list[tuple[str, Callable[[bytes], Any], list[messages.Message]]] = [
        ("status", messages.decode_status, [messages.Status(online=True, version="0.1.0", state="idle", task="t")]),
        ("profile", messages.decode_profile, [ANNOUNCEMENT]),
        ("task", messages.decode_task, [TASK, messages.Close(run="run1")]),
        ("report", messages.decode_report, list(REPORTS)),
        ("deployment", deployment.decode_deployment, [DEPLOY, deployment.Rollback(deployment="d1", reason="a canary")]),
        ("condition", deployment.decode_condition, [deployment.Condition(), CONDITION]),
        (
            "transfer",
            messages.decode_transfer,
            [
                messages.Want(sha256=SHA256),
                messages.Receipt(sha256=SHA256),
                messages.Gone(sha256=SHA256),
                messages.RequestBlocks(transfer=SHA256[:16], ranges=((0, 2), (5, 1))),
                make_offers(SHA256, Outline(size_bytes=200_000, hashes=b"12345678" * 4))[0],
            ],
        ),
    ]
    return [
        Target(
            name=f"message_{name}",
            check=_round_trip(decode),
            seeds=[messages.encode(message) for message in examples],
            errors=(RemoteProtocolError,),
            memory_bytes=MESSAGE_MEMORY_BYTES,
            text=True,
        )
        for name, decode, examples in kinds
    ]


def _round_trip(decode: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        message = decode(data)
        assert decode(messages.encode(message)) == message

    return check


# Signatures.


class _Envelopes:
    """A sealed message is believed if its signature is right, and then it is what was signed."""

    def __init__(self) -> None:
        seed = bytes(range(32))
        pem = _pem("PRIVATE KEY", bytes.fromhex("302e020100300506032b657004220420") + seed)
        self._key = signing.SigningKey.from_pem(pem)
        self.message = messages.encode(ANNOUNCEMENT)

    def seeds(self) -> list[bytes]:
        sealed = [
            signing.seal(TOPIC, self.message, self._key, certificate=certificate)
            for certificate in ("", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        ]
        return [*sealed, self.message]

    def check(self, data: bytes) -> None:
        sealed = signing.unseal(TOPIC, data)
        assert len(sealed.message) <= len(data)
        assert len(sealed.certificate) <= signing.MAX_CERTIFICATE_BYTES
        signing.verify(TOPIC, sealed, self._key.public)
        assert sealed.message == self.message


def _pem(label: str, der: bytes) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.b64encode(der).decode()}\n-----END {label}-----\n".encode()


def _check_key(data: bytes) -> None:
    for kind in (signing.SigningKey, signing.VerifyKey):
        try:
            kind.from_pem(data)
        except ConfigError as exc:
            refused = exc
        else:
            return
    raise refused


def signing_targets() -> list[Target]:
    envelopes = _Envelopes()
    keys = [
        _pem("PRIVATE KEY", bytes.fromhex("302e020100300506032b657004220420") + bytes(32)),
        _pem("PUBLIC KEY", bytes.fromhex("302a300506032b6570032100") + bytes(32)),
    ]
    return [
        Target(
            name="envelope",
            check=envelopes.check,
            seeds=envelopes.seeds(),
            errors=(RemoteProtocolError,),
            memory_bytes=MESSAGE_MEMORY_BYTES,
            text=True,
        ),
        Target(name="key", check=_check_key, seeds=keys, errors=(ConfigError,), memory_bytes=MESSAGE_MEMORY_BYTES),
    ]


# Blocks and topics.


def _check_block(data: bytes) -> None:
    block = blocks.parse_block(data)
    assert 1 <= len(block.content) <= BLOCK_BYTES
    repacked = blocks.pack_block(block)
    assert repacked[:3] + repacked[4:16] + repacked[20:] == data[:3] + data[4:16] + data[20:]


def _check_topic(data: bytes) -> None:
    topic = data.decode("utf-8", "surrogateescape")
    topics.is_blob_topic("fed", topic)
    device, kind = topics.parse_device_topic("fed", topic)
    assert topics.device_topic("fed", device, kind) == topic
    assert topics.check_name(device, "device") == device


def block_targets() -> list[Target]:
    content = [blocks.pack_block(Block(SHA256[:16], index, b"x" * size)) for index, size in ((0, 1), (2**32 - 1, 700))]
    names = [topics.device_topic("fed", "pi-1", kind).encode() for kind in (*topics.UP_TOPICS, *topics.DOWN_TOPICS)]
    refused = (RemoteProtocolError,)
    return [
        Target(name="block", check=_check_block, seeds=content, errors=refused, memory_bytes=TRANSFER_MEMORY_BYTES),
        Target(
            name="topic",
            check=_check_topic,
            seeds=[*names, topics.blob_topic("fed", SHA256[:16], "offer").encode()],
            errors=refused,
            memory_bytes=TRANSFER_MEMORY_BYTES,
        ),
    ]


# Transfers: programs for a peer that lies.

CONTENTS = (b"", b"a", b"b" * BLOCK_BYTES, bytes(range(256)) * 300, b"tail" * 40_001)
"""Blobs of 0, 1, 1, 2 and 3 blocks."""

MAX_BLOB_BYTES = 1 << 18


def _ref(content: bytes) -> BlobRef:
    return BlobRef(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def _hashes(content: bytes, block_bytes: int) -> bytes:
    return b"".join(
        blocks.block_hash(content[start : start + block_bytes]) for start in range(0, len(content), block_bytes)
    )


class _Receiver:
    """Our end wants blobs; the program is what we ask for, what the peer says, and how the time passes."""

    def __init__(self, directory: Path) -> None:
        self._store = BlobStore(directory / "receiver", max_blob_bytes=MAX_BLOB_BYTES)

    def check(self, data: bytes) -> None:
        self._store.sweep(set())
        self._said: list[bytes] = []
        self._open: set[tuple[str, str]] = set()
        self._wanted: dict[str, BlobRef] = {}
        self._now = 0.0
        self._courier = Courier(
            self._store,
            self._said.append,
            subscribe_block=lambda transfer, name: self._open.add((transfer, name)),
            unsubscribe_block=lambda transfer, name: self._open.discard((transfer, name)),
        )
        self._courier.set_connected(True, self._now)
        program = Choices(data)
        try:
            while program:
                program.one_of(self._STEPS)(self, program)
                self._check_state()
        finally:
            self._courier.close()
        assert not self._open, "subscriptions are left behind"

    def _check_state(self) -> None:
        assert self._courier.fetching <= self._wanted.keys()
        assert len(self._open) <= 2 * 9, "more blocks are subscribed to than two windows and offers"
        for payload in self._said:
            message = messages.decode_transfer(payload)
            if isinstance(message, messages.RequestBlocks):
                assert sum(count for _, count in message.ranges) <= 8
        self._said.clear()
        wakeup = self._courier.next_wakeup(self._now)
        assert wakeup is None or wakeup >= self._now

    def _happened(self, events: list[Any]) -> None:
        for event in events:
            match event:
                case Fetched(sha256):
                    self._store.read(self._wanted[sha256])
                case Lost(sha256, reason):
                    assert sha256 in self._wanted
                    assert reason
                    assert sha256 not in self._courier.fetching
                case Delivered(sha256):
                    assert self._store.has(sha256)

    def _hear(self, payload: bytes) -> None:
        self._now += 0.01
        try:
            self._happened(self._courier.handle(payload, self._now))
        except RemoteProtocolError:
            return

    def _fetch(self, program: Choices) -> None:
        content = program.one_of(CONTENTS)
        ref = _ref(content)
        size = program.below(8)
        if size == 1:
            ref = BlobRef(sha256=ref.sha256, size_bytes=len(content) + 1)  # whoever named the blob lied about its size
        elif size == 2:
            ref = BlobRef(sha256=ref.sha256, size_bytes=program.one_of((MAX_BLOB_BYTES, MAX_BLOB_BYTES + 1, 2**53)))
        ref = self._wanted.setdefault(ref.sha256, ref)
        assert len(self._wanted) <= MAX_FETCHES
        self._happened(self._courier.fetch(ref, self._now, broadcast=bool(program.below(2))))

    def _offer(self, program: Choices) -> None:
        content = program.one_of(CONTENTS)
        block_bytes = program.one_of((BLOCK_BYTES, BLOCK_BYTES, 1024, 4096, 262_144))
        outline = Outline(size_bytes=len(content), hashes=_hashes(content, block_bytes), block_bytes=block_bytes)
        fields: dict[str, Any] = msgspec.to_builtins(make_offers(_ref(content).sha256, outline)[0])
        for _ in range(program.below(3)):
            key = program.one_of(sorted(fields))
            lies = (0, 1, -1, 2, 4096, 2**53, 2**64, "", "é", "AAAA", "A" * 11, "A" * 80_001, None, fields[key])
            fields[key] = program.one_of(lies)
        self._hear(msgspec.json.encode(fields))

    def _block(self, program: Choices) -> None:
        content = program.one_of(CONTENTS)
        block_bytes = program.one_of((BLOCK_BYTES, 1024, 4096))
        index = program.one_of((0, 1, 2, 3, 4, 2**32 - 1))
        piece = content[index * block_bytes : (index + 1) * block_bytes] or b"?"
        if program.below(8) == 1:
            piece = piece[:-1] + b"!"
        self._hear(blocks.pack_block(Block(_ref(content).sha256[:16], index, piece)))

    def _say_other(self, program: Choices) -> None:
        kind = program.one_of((messages.Gone, messages.Receipt, messages.Want))
        self._hear(messages.encode(kind(sha256=_ref(program.one_of(CONTENTS)).sha256)))

    def _garbage(self, program: Choices) -> None:
        self._hear(program.take(program.below(64)))

    def _tick(self, program: Choices) -> None:
        self._now += program.one_of((0.0, 0.5, 5.0, 100.0))
        self._happened(self._courier.tick(self._now))

    def _connection(self, program: Choices) -> None:
        self._happened(self._courier.set_connected(bool(program.below(3)), self._now))

    def _cancel(self, program: Choices) -> None:
        self._courier.cancel(_ref(program.one_of(CONTENTS)).sha256)

    _STEPS = (_fetch, _offer, _block, _block, _offer, _block, _say_other, _garbage, _tick, _connection, _cancel)


class _Sender:
    """Our end serves blobs; the program is what the peer asks for. It gets what it may have, and never in excess."""

    def __init__(self, directory: Path) -> None:
        self._store = BlobStore(directory / "sender")
        self._refs = [self._store.put(content) for content in CONTENTS]
        self._served = {ref.sha256 for ref in self._refs[1:]}
        self._secret = self._refs[0].sha256

    def check(self, data: bytes) -> None:
        said: list[bytes] = []
        courier = Courier(self._store, said.append, may_serve=lambda sha256: sha256 in self._served)
        courier.set_connected(True, 0.0)
        program = Choices(data)
        while program:
            payload = program.one_of(self._STEPS)(self, program)
            said.clear()
            try:
                events = courier.handle(payload, 0.0)
            except RemoteProtocolError:
                assert not said, "something was sent for a request that was refused"
                continue
            assert all(isinstance(event, Delivered) and self._store.has(event.sha256) for event in events)
            assert len(said) <= 8
            for each in said:
                self._check_answer(each)

    def _check_answer(self, payload: bytes) -> None:
        if blocks.is_block(payload):
            block = blocks.parse_block(payload)
            sha256 = next(ref.sha256 for ref in self._refs if ref.sha256.startswith(block.transfer))
            assert sha256 in self._served
            assert block.content == self._store.read_block(sha256, block.index)
            return
        message = messages.decode_transfer(payload)
        assert isinstance(message, messages.Gone) or (
            isinstance(message, messages.BlobOffer) and message.sha256 in self._served
        )

    def _want(self, program: Choices) -> bytes:
        kind = program.one_of((messages.Want, messages.Receipt, messages.Gone))
        return messages.encode(kind(sha256=program.one_of((*[ref.sha256 for ref in self._refs], "0" * 64))))

    def _request(self, program: Choices) -> bytes:
        ranges = [
            (
                program.one_of((0, 1, 2, 3, 2**31, 2**32, 2**47, 2**53, -1, *map(_as_int, NUMBERS[:30]))),
                program.one_of((1, 1, 2, 0, 7, 8, 9, 2**53, -1)),
            )
            for _ in range(program.one_of((1, 2, 0, 64, 65)))
        ]
        transfer = program.one_of((*[ref.sha256[:16] for ref in self._refs], "0" * 16, "*" * 16, "?"))
        return msgspec.json.encode({"type": "request", "transfer": transfer, "ranges": ranges})

    def _garbage(self, program: Choices) -> bytes:
        return program.take(program.below(64))

    _STEPS = (_want, _request, _request, _garbage)


def _as_int(number: str) -> int:
    return min(max(int(float(number)), -(2**63)), 2**64 - 1)


def transfer_targets(directory: Path) -> list[Target]:
    step = _Receiver._STEPS.index
    whole = []  # fetch, offer and every block, for each content
    for number, content in enumerate(CONTENTS):
        n_blocks = blocks.count_blocks(len(content))
        fetch = [step(_Receiver._fetch), number, 0, number % 2]
        offer = [step(_Receiver._offer), number, 0, 0]
        whole.append(bytes([*fetch, *offer, *(b for i in range(n_blocks) for b in (2, number, 0, i, 0))]))
    receiver, sender = _Receiver(directory), _Sender(directory)
    return [
        Target(
            name="receiver",
            check=receiver.check,
            seeds=[*whole, b"".join(whole)],
            errors=(),
            memory_bytes=TRANSFER_MEMORY_BYTES,
        ),
        Target(
            name="sender",
            check=sender.check,
            seeds=[bytes([0, 0, 1, 1, 0, 0, 0, 1]), bytes([1, 1, 0, 0, 2, 2, 1, 1, 3, 1, 4, 0, 0, 9])],
            errors=(),
            memory_bytes=TRANSFER_MEMORY_BYTES,
        ),
    ]


def targets(directory: Path) -> list[Target]:
    return [*message_targets(), *signing_targets(), *block_targets(), *transfer_targets(directory)]
