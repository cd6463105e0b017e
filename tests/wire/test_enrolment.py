"""The enrolment file's form."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.errors import ConfigError
from reft_edge.wire.enrolment import MAX_ENROLMENT_BYTES, Enrolment, decode_enrolment, encode_enrolment

BODY_OF_THE_KEY = "c2VjcmV0"


@pytest.fixture(scope="module")
def enrolment() -> Enrolment:
    certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    return Enrolment(
        device="pi-1",
        federation="birds",
        broker_host="broker.local",
        broker_port=8883,
        ca=certificate,
        certificate=certificate,
        key=f"-----BEGIN PRIVATE KEY-----\n{BODY_OF_THE_KEY}\n-----END PRIVATE KEY-----\n",
        coordinator_key="-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    )


def test_what_is_written_is_read(enrolment: Enrolment) -> None:
    assert decode_enrolment(encode_enrolment(enrolment)) == enrolment


def test_neither_repr_nor_error_shows_the_key(enrolment: Enrolment) -> None:
    assert BODY_OF_THE_KEY not in repr(enrolment)
    assert BODY_OF_THE_KEY not in f"{enrolment!s}"
    damaged = encode_enrolment(enrolment).replace(b"BEGIN PRIVATE", b"BEGIN PIRATE")
    with pytest.raises(ConfigError, match=r"is damaged: .*`\$.key`; make a new one") as caught:
        decode_enrolment(damaged)
    assert BODY_OF_THE_KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], "x.enrol is cut off"),
        (lambda _: b"", "x.enrol is cut off"),
        (lambda _: b"\xff\xfe", "x.enrol is cut off"),
        (lambda _: b'{"type": "task"}', "x.enrol is not an enrolment file"),
        (lambda _: b"[" * 60_000, "x.enrol"),
        (lambda _: b" " * (MAX_ENROLMENT_BYTES + 1), "x.enrol: larger than"),
        (lambda data: data.replace(b'"schema": 1', b'"schema": 2'), "has version 2 and this reft-edge reads version 1"),
        (lambda data: data.replace(b'"pi-1"', b'"../pi"'), r"damaged: .*`\$.device`"),
        (lambda data: data.replace(b'"broker.local"', b'"a b"'), r"damaged: .*`\$.broker_host`"),
        (lambda data: data.replace(b"8883", b"88830"), r"damaged: .*`\$.broker_port`"),
    ],
    ids=["truncated", "empty", "binary", "other JSON", "nested", "large", "version", "device", "host", "port"],
)
def test_a_wrong_file_is_one_clear_line(enrolment: Enrolment, change: object, words: str) -> None:
    assert callable(change)
    with pytest.raises(ConfigError, match=words):
        decode_enrolment(change(encode_enrolment(enrolment)), origin="x.enrol")


def test_unknown_fields_of_a_newer_version_are_ignored(enrolment: Enrolment) -> None:
    fields = msgspec.json.decode(encode_enrolment(enrolment)) | {"colour": "red"}
    assert decode_enrolment(msgspec.json.encode(fields)) == enrolment


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_the_documented_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        decode_enrolment(data)
