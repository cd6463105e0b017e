"""Control messages and topics: what is valid round-trips, what is not is refused and nothing else happens."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire import messages, topics
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.messages import Close, Failed, Receipt, RequestBlocks, Task, TrainingPlan, Want, WeightsRef

BLOB = BlobRef(sha256="a" * 64, size_bytes=10)
TASK = Task(
    task="run1-r0-pi",
    round=0,
    run="run1",
    bundle=BLOB,
    weights=WeightsRef(blob=BLOB, codec=Int8()),
    plan=TrainingPlan(local_epochs=1, batch_size=32, learning_rate=0.1, seed=1),
    deadline=1e9,
    classes=("cat", "dog"),
)
DECODERS = [
    messages.decode_status,
    messages.decode_profile,
    messages.decode_task,
    messages.decode_report,
    messages.decode_transfer,
]


def test_messages_round_trip_as_readable_json_with_a_schema_version() -> None:
    assert messages.decode_task(messages.encode(TASK)) == TASK
    assert messages.decode_task(messages.encode(Close(run="run1"))) == Close(run="run1")
    failed = Failed(task="t", kind="out_of_memory", reason="é")
    assert messages.decode_report(messages.encode(failed)) == failed
    request = RequestBlocks(transfer="0" * 16, ranges=((0, 2), (5, 1)))
    assert messages.decode_transfer(messages.encode(request)) == request
    readable = msgspec.json.decode(messages.encode(TASK))
    assert (readable["type"], readable["schema"], readable["classes"]) == ("task", 1, ["cat", "dog"])


def test_a_newer_peer_may_add_fields_and_an_unknown_type_is_refused() -> None:
    newer = {**msgspec.json.decode(messages.encode(TASK)), "invented_later": [1]}
    assert messages.decode_task(msgspec.json.encode(newer)) == TASK
    with pytest.raises(RemoteProtocolError):
        messages.decode_task(msgspec.json.encode({**newer, "type": "invented_later"}))


@pytest.mark.parametrize(
    "change",
    [
        {"task": "../x"},
        {"task": ""},
        {"round": -1},
        {"deadline": float("nan")},
        {"bundle": {"sha256": "A" * 64, "size_bytes": 1}},
        {"bundle": {"sha256": "a" * 64, "size_bytes": -1}},
        {"plan": {"local_epochs": 0, "batch_size": 1, "learning_rate": 0.1, "seed": 0}},
        {"plan": {"local_epochs": 1, "batch_size": 10**9, "learning_rate": 0.1, "seed": 0}},
        {"weights": {"blob": {"sha256": "a" * 64, "size_bytes": 1}, "codec": "pickle"}},
    ],
)
def test_a_task_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode_task(msgspec.json.encode({**msgspec.json.decode(messages.encode(TASK)), **change}))


@given(payload=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
def test_garbage_raises_remote_protocol_error_and_nothing_else(payload: bytes) -> None:
    for decode in DECODERS:
        with pytest.raises(RemoteProtocolError):
            decode(payload)


def test_deep_nesting_and_size_are_bounded() -> None:
    for payload in (b"[" * 90_000, b'{"type":"want","x":' + b'{"y":' * 10_000, b" " * 200_000):
        with pytest.raises(RemoteProtocolError):
            messages.decode_transfer(payload)


@pytest.mark.parametrize("sha256", ["a" * 63, "A" * 64, "a" * 64 + "\n", "../" * 21 + "a"])
def test_names_of_blobs_are_hashes(sha256: str) -> None:
    for kind in (Want, Receipt):
        with pytest.raises(RemoteProtocolError):
            messages.decode_transfer(messages.encode(kind(sha256=sha256)))


def test_topics_are_parsed_back_and_foreign_ones_refused() -> None:
    for kind in (*topics.UP_TOPICS, *topics.DOWN_TOPICS):
        assert topics.parse_device_topic("fed", topics.device_topic("fed", "pi-1", kind)) == ("pi-1", kind)
    foreign = ["", "reft/v1/fed/device/pi-1", "reft/v1/other/device/pi-1/up", "reft/v1/fed/device/a b/up"]
    for topic in (*foreign, "reft/v1/fed/device/pi-1/up/x", "reft/v1/fed/device/pi-1/root", "reft/v1/fed/blob/0/1"):
        with pytest.raises(RemoteProtocolError):
            topics.parse_device_topic("fed", topic)
    assert topics.is_blob_topic("fed", topics.blob_topic("fed", "0" * 16, "offer"))
    assert not topics.is_blob_topic("fed", topics.device_topic("fed", "pi-1", "down"))
    for name in ("", "a/b", "a+", "#", "a b", "é", "a" * 65, "a\n"):
        with pytest.raises(ConfigError, match="device"):
            topics.check_name(name, "device")
