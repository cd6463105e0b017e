from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.messages import MAX_MESSAGE_BYTES, Status, decode_status, encode
from reft_edge.wire.signing import (
    MAX_CERTIFICATE_BYTES,
    MAX_SEALED_BYTES,
    SigningKey,
    VerifyKey,
    seal,
    unseal,
    verify,
)

TOPIC = "reft/v1/f/device/d/report"
PROFILE_TOPIC = "reft/v1/f/device/d/profile"


def private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.from_pem(private_pem(Ed25519PrivateKey.generate()))


def accepted(topic: str, payload: bytes, key: VerifyKey) -> bytes | None:
    """The message in a payload that is in order, else None."""
    try:
        sealed = unseal(topic, payload)
        verify(topic, sealed, key)
    except RemoteProtocolError:
        return None
    return sealed.message


def test_a_sealed_message_comes_back_as_the_same_bytes(key: SigningKey) -> None:
    message = b'{ "type" : "status","online":true , "unknown":[1,  {"a":"\\u00e9"}]}'
    payload = seal(TOPIC, message, key)
    assert accepted(TOPIC, payload, key.public) == message
    assert decode_status(unseal(TOPIC, payload).message) == Status(online=True)


def test_a_sealed_message_is_readable_json(key: SigningKey) -> None:
    payload = seal(PROFILE_TOPIC, encode(Status(online=True)), key, certificate="PEM")
    envelope = msgspec.json.decode(payload)
    assert list(envelope) == ["message", "signature", "certificate"]
    assert envelope["message"]["type"] == "status"


def test_signatures_agree_with_another_library() -> None:
    other = Ed25519PrivateKey.generate()
    ours = SigningKey.from_pem(private_pem(other))
    assert VerifyKey.from_pem(public_pem(other)) == ours.public
    assert ours.sign(b"text") == other.sign(b"text")
    assert ours.public.raw == other.public_key().public_bytes_raw()


def test_without_a_key_a_message_stays_as_it_is_and_is_not_believed(key: SigningKey) -> None:
    message = encode(Status(online=True))
    payload = seal(TOPIC, message, None)
    assert payload == message
    assert unseal(TOPIC, payload).message == message
    with pytest.raises(RemoteProtocolError, match="not signed"):
        verify(TOPIC, unseal(TOPIC, payload), key.public)


def test_an_envelope_without_a_signature_is_not_believed(key: SigningKey) -> None:
    sealed = unseal(TOPIC, b'{"message":{}}')
    with pytest.raises(RemoteProtocolError, match="not signed"):
        verify(TOPIC, sealed, key.public)


def test_every_flipped_bit_is_refused_or_leaves_the_message_as_signed(key: SigningKey) -> None:
    """A bit of the envelope's own spelling may be flipped without harm, as in the case of `certificate`'s name."""
    message = encode(Status(online=True))
    payload = seal(TOPIC, message, key)
    start = payload.index(message)
    signature = payload.index(b'"signature":"') + len('"signature":"')
    inside = {*range(start, start + len(message)), *range(signature, signature + 88)}
    for index in range(len(payload)):
        for bit in range(8):
            changed = bytearray(payload)
            changed[index] ^= 1 << bit
            got = accepted(TOPIC, bytes(changed), key.public)
            assert got is None or (got == message and index not in inside), (index, bit)


def test_a_message_moved_to_another_topic_is_refused(key: SigningKey) -> None:
    payload = seal(TOPIC, b'{"a":1}', key)
    for other in ("reft/v1/f/device/d/task", "reft/v1/f/device/e/report", "reft/v1/g/device/d/report"):
        assert accepted(other, payload, key.public) is None


def test_a_message_of_another_signer_is_refused_and_the_expected_key_is_named(key: SigningKey) -> None:
    other = SigningKey.from_pem(private_pem(Ed25519PrivateKey.generate()))
    with pytest.raises(RemoteProtocolError, match=key.public.fingerprint[:16]):
        verify(TOPIC, unseal(TOPIC, seal(TOPIC, b"{}", other)), key.public)


def test_what_a_key_signed_elsewhere_is_no_message(key: SigningKey) -> None:
    """A TLS handshake is signed with the same key: without the context it must not pass."""
    message = b'{"a":1}'
    signature = base64.b64encode(key.sign(TOPIC.encode() + b"\n" + message)).decode()
    payload = msgspec.json.encode({"message": {"a": 1}, "signature": signature})
    assert accepted(TOPIC, payload, key.public) is None


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"nonsense",
        b'{"message":}',
        b'{"message":{},"signature":7}',
        b'{"message":{},"signature":"*"}',
        b'{"message":{},"signature":"\xff"}',
        b'{"message":{},"signature":"AAAA"}',
        b'{"message":{},"certificate":"on the wrong topic"}',
        b"[" * 100_000,
        b'{"x":' + b"[" * 50_000,
    ],
)
def test_garbage_is_refused_with_a_reason(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unseal(TOPIC, payload)


def test_sizes_are_bounded_before_anything_is_parsed(key: SigningKey) -> None:
    with pytest.raises(RemoteProtocolError, match="at most"):
        unseal(TOPIC, b" " * (MAX_SEALED_BYTES + 1))
    with pytest.raises(RemoteProtocolError, match="too large"):
        unseal(PROFILE_TOPIC, seal(PROFILE_TOPIC, b"{}", key, certificate="x" * (MAX_CERTIFICATE_BYTES + 1)))


def test_the_largest_message_with_the_largest_certificate_fits(key: SigningKey) -> None:
    message = b'"' + b"x" * (MAX_MESSAGE_BYTES - 2) + b'"'
    payload = seal(PROFILE_TOPIC, message, key, certificate="x" * (MAX_CERTIFICATE_BYTES - 200) + "\n" * 200)
    assert len(payload) <= MAX_SEALED_BYTES < 128 * 1024
    assert accepted(PROFILE_TOPIC, payload, key.public) == message


# Key files


def write(path: Path, data: bytes, mode: int) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_key_files_are_read(tmp_path: Path) -> None:
    made = Ed25519PrivateKey.generate()
    private = SigningKey.read(write(tmp_path / "key", private_pem(made), 0o600))
    public = VerifyKey.read(str(write(tmp_path / "pub", public_pem(made), 0o644)))
    assert private.public == public
    assert len(public.fingerprint) == 64


def test_a_key_that_everybody_can_read_is_refused_and_one_for_a_group_is_not(tmp_path: Path) -> None:
    pem = private_pem(Ed25519PrivateKey.generate())
    with pytest.raises(ConfigError, match=r"shared.key.*chmod o-r"):
        SigningKey.read(write(tmp_path / "shared.key", pem, 0o644))
    SigningKey.read(write(tmp_path / "group.key", pem, 0o640))


def test_a_public_key_that_everybody_can_replace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"theirs.pub.*chmod o-w"):
        VerifyKey.read(write(tmp_path / "theirs.pub", public_pem(Ed25519PrivateKey.generate()), 0o666))


def wrong_keys() -> dict[str, bytes]:
    made = Ed25519PrivateKey.generate()
    good = private_pem(made)
    encrypted = made.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    return {
        "empty": b"",
        "text": b"hello",
        "public": public_pem(made),
        "encrypted": encrypted,
        "elliptic": private_pem(ec.generate_private_key(ec.SECP256R1())),
        "damaged": good.replace(b"MC4C", b"MC4=", 1),
        "cut": good[:60],
        "twice": good + good,
        "large": good + b"\n" * 5000,
    }


@pytest.mark.parametrize("what", wrong_keys())
def test_a_wrong_private_key_file_is_named_with_the_way_out(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "device.key", wrong_keys()[what], 0o600)
    with pytest.raises(ConfigError, match=r"device.key.*(provision|not a key)"):
        SigningKey.read(path)


def test_missing_key_files_and_raw_keys_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*No such file"):
        VerifyKey.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="31 bytes"):
        VerifyKey.from_raw(bytes(31))


def test_a_private_key_is_not_shown() -> None:
    made = Ed25519PrivateKey.generate()
    key = SigningKey.from_pem(private_pem(made))
    assert made.private_bytes_raw().hex() not in repr(key)
    assert repr(made.private_bytes_raw()) not in repr(key)
    assert "_secret" not in repr(key)
