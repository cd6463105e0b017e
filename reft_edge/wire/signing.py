"""Signed control messages: who said it, and that nobody changed it on the way.

A sealed message is readable JSON:

    {"message": {...}, "signature": "<base64>", "certificate": "<PEM, only beside a profile>"}

The signature (Ed25519, RFC 8032) covers a context, the topic and the exact bytes of `message`. The topic holds
federation, device and kind, so a message cannot be moved to another; the context keeps what is signed here apart from
what the same key signs in a TLS handshake.

What this does not do: a signature has no memory. Replays are refused by the sequence in a task and by the task id of an
update. Blocks are not signed, because a signed message names the SHA-256 of every blob.

Uses `nacl.bindings` (1.1 MiB in the daemon; `cryptography` takes 9). PEM is read here by hand, since Ed25519's DER is a
fixed prefix and 32 bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from nacl.bindings import crypto_sign, crypto_sign_open, crypto_sign_seed_keypair
from nacl.exceptions import CryptoError

from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.messages import MAX_MESSAGE_BYTES

CONTEXT = b"reft-edge/v1\n"

SIGNATURE_BYTES = 64
KEY_BYTES = 32

MAX_CERTIFICATE_BYTES = 8 * 1024
"""PEM. A certificate with an RSA key of 4096 bits has 3 KiB; ours have 1."""

MAX_SEALED_BYTES = MAX_MESSAGE_BYTES + 2 * MAX_CERTIFICATE_BYTES
"""112 KiB with what JSON adds: still below the 128 KiB packet limit of our broker configuration."""

MAX_KEY_FILE_BYTES = 4096
"""A key file takes 119 bytes; a larger one is some other file."""

_PRIVATE_PREFIX = bytes.fromhex("302e020100300506032b657004220420")
"""DER of PKCS #8 before the 32 bytes of an Ed25519 seed (RFC 8410, section 7)."""
_PUBLIC_PREFIX = bytes.fromhex("302a300506032b6570032100")
"""DER of SubjectPublicKeyInfo before the 32 bytes of an Ed25519 public key (RFC 8410, section 4)."""

_PEM = re.compile(rb"\s*-----BEGIN ([A-Z0-9 ]+)-----\s+([A-Za-z0-9+/=\s]+)-----END \1-----\s*")


@dataclass(frozen=True)
class VerifyKey:
    """A public key: checks what the holder of the private one has signed."""

    raw: bytes
    """(32,) bytes."""

    @classmethod
    def read(cls, path: Path | str) -> VerifyKey:
        """Read a public key file (PEM). Raises `ConfigError`, also where everybody may write it.

        Whoever can replace this file decides whom we believe.
        """
        return cls.from_pem(_read_key_file(path, forbidden=stat.S_IWOTH, may="write"), origin=str(path))

    @classmethod
    def from_pem(cls, pem: bytes, *, origin: str = "the public key") -> VerifyKey:
        return cls.from_raw(_key_bytes(pem, "PUBLIC KEY", _PUBLIC_PREFIX, origin), origin=origin)

    @classmethod
    def from_raw(cls, raw: bytes, *, origin: str = "the public key") -> VerifyKey:
        if len(raw) != KEY_BYTES:
            raise ConfigError(f"{origin} has {len(raw)} bytes; an Ed25519 key has {KEY_BYTES}")
        return cls(raw)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key, hexadecimal: how messages to people and the agent's state name it."""
        return hashlib.sha256(self.raw).hexdigest()


@dataclass(frozen=True)
class SigningKey:
    """A private key. It is never shown: `repr` leaves it out."""

    public: VerifyKey
    _secret: bytes = field(repr=False)
    """(64,) bytes, libsodium's form: seed and public key."""

    @classmethod
    def read(cls, path: Path | str) -> SigningKey:
        """Read a private key file (PEM). Raises `ConfigError`, also where everybody may read it.

        A key that others can read no longer says who signed. The file's group may read it, so that a service can be
        given a key that it does not own.
        """
        return cls.from_pem(_read_key_file(path, forbidden=stat.S_IROTH, may="read"), origin=str(path))

    @classmethod
    def from_pem(cls, pem: bytes, *, origin: str = "the private key") -> SigningKey:
        public, secret = crypto_sign_seed_keypair(_key_bytes(pem, "PRIVATE KEY", _PRIVATE_PREFIX, origin))
        return cls(VerifyKey(public), secret)

    def sign(self, text: bytes) -> bytes:
        """(64,) bytes."""
        return crypto_sign(text, self._secret)[:SIGNATURE_BYTES]


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A message as it came: nothing of it is believed until `verify` was called."""

    message: bytes
    signature: bytes | None = None
    certificate: str = ""


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON form. Without `message` it is no envelope but an unsigned message, whose own fields are ignored here."""

    message: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    signature: str = ""
    certificate: str = ""


_decoder = msgspec.json.Decoder(_Envelope)
_encoder = msgspec.json.Encoder()


def seal(topic: str, message: bytes, key: SigningKey | None, *, certificate: str = "") -> bytes:
    """Sign an encoded message for a topic; without a key it stays as it is."""
    if key is None:
        return message
    signature = base64.b64encode(key.sign(_signed_text(topic, message))).decode()
    return _encoder.encode(_Envelope(message=msgspec.Raw(message), signature=signature, certificate=certificate))


def unseal(topic: str, payload: bytes) -> Sealed:
    """Take a payload apart, signed or not. Raises `RemoteProtocolError` for what is neither."""
    if len(payload) > MAX_SEALED_BYTES:
        raise RemoteProtocolError(f"message of {len(payload)} bytes; at most {MAX_SEALED_BYTES} are read")
    try:
        envelope = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"message is not valid: {exc}") from exc
    if isinstance(envelope.message, msgspec.UnsetType):
        return Sealed(message=payload)
    if envelope.certificate and not topic.endswith("/profile"):
        raise RemoteProtocolError("a certificate came with it, which belongs beside a profile only")
    if len(envelope.certificate) > MAX_CERTIFICATE_BYTES:
        raise RemoteProtocolError(f"certificate of {len(envelope.certificate)} characters is too large")
    return Sealed(
        message=bytes(envelope.message),
        signature=_decode_signature(envelope.signature),
        certificate=envelope.certificate,
    )


def verify(topic: str, sealed: Sealed, key: VerifyKey) -> None:
    """Raises `RemoteProtocolError` unless the holder of `key` signed this message for this topic."""
    if sealed.signature is None:
        raise RemoteProtocolError("it is not signed")
    try:
        crypto_sign_open(sealed.signature + _signed_text(topic, sealed.message), key.raw)
    except CryptoError as exc:
        raise RemoteProtocolError(f"its signature is not by the key {key.fingerprint[:16]}") from exc


def _signed_text(topic: str, message: bytes) -> bytes:
    """Topics have no line breaks: their names are checked where they come in."""
    return CONTEXT + topic.encode() + b"\n" + message


def _decode_signature(text: str) -> bytes | None:
    """None for an envelope without a signature. Only one spelling of each signature is taken."""
    if not text:
        return None
    try:
        signature = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RemoteProtocolError("its signature is not base64") from exc
    if len(signature) != SIGNATURE_BYTES or base64.b64encode(signature).decode() != text:
        raise RemoteProtocolError(f"its signature does not have {SIGNATURE_BYTES} bytes")
    return signature


def _read_key_file(path: Path | str, *, forbidden: int, may: str) -> bytes:
    path = Path(path)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            pem = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"key file {str(path)!r} cannot be read: {exc.strerror or exc}") from exc
    if mode & forbidden:
        raise ConfigError(
            f"key file {str(path)!r}: every user of this machine may {may} it; run: chmod o-{may[0]} {path}"
        )
    if len(pem) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"key file {str(path)!r} is larger than {MAX_KEY_FILE_BYTES} bytes; this is not a key")
    return pem


def _key_bytes(pem: bytes, label: str, prefix: bytes, origin: str) -> bytes:
    """The 32 bytes of an Ed25519 key."""
    found = _PEM.fullmatch(pem)
    if found is None:
        raise ConfigError(f"{origin} is not one PEM block -----BEGIN {label}-----; give the file that provision wrote")
    if found[1] != label.encode():
        raise ConfigError(f"{origin} holds a {found[1].decode()}; expected a {label}, as provision writes it")
    try:
        der = base64.b64decode(b"".join(found[2].split()), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ConfigError(f"{origin} is damaged: not base64; give the file that provision wrote") from exc
    if not der.startswith(prefix) or len(der) != len(prefix) + KEY_BYTES:
        raise ConfigError(f"{origin} is not an Ed25519 key; give the file that provision wrote")
    return der[len(prefix) :]
