"""The enrolment file: everything one device needs to join a federation, in one JSON document.

`reft-edge provision` writes it, a person carries it to the device, and `reft-edge agent --enrol` installs what it
holds. With the device's private key in it, it is a secret until it is deleted: the key never appears in an error or a
`repr`. What its certificates and keys are worth is checked where they are installed; here only the form is.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from reft_edge.errors import ConfigError

SCHEMA = 1

MAX_ENROLMENT_BYTES = 64 * 1024
"""Four PEM texts of about 1 KiB each; a larger file is some other file."""

MAX_PEM_CHARACTERS = 8 * 1024
"""A certificate with an RSA key of 4096 bits has 3 KiB; ours have 1."""

Name: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
CertificateText: TypeAlias = Annotated[
    str, Meta(max_length=MAX_PEM_CHARACTERS, pattern=r"^-----BEGIN CERTIFICATE-----\n")
]
PrivateKeyText: TypeAlias = Annotated[
    str, Meta(max_length=MAX_PEM_CHARACTERS, pattern=r"^-----BEGIN PRIVATE KEY-----\n")
]
PublicKeyText: TypeAlias = Annotated[str, Meta(max_length=MAX_PEM_CHARACTERS, pattern=r"^-----BEGIN PUBLIC KEY-----\n")]


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """One device's place in a federation. Keys and certificates are PEM."""

    device: Name
    federation: Name
    broker_host: Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[^\s\x00-\x1f]+\Z")]
    broker_port: Annotated[int, Meta(ge=1, le=65_535)]
    ca: CertificateText
    certificate: CertificateText
    key: PrivateKeyText
    """The device's private Ed25519 key (PKCS8)."""
    coordinator_key: PublicKeyText
    """The coordinator's public Ed25519 key (SPKI): what it signs is obeyed."""
    format: Literal["reft-edge enrolment"] = "reft-edge enrolment"
    schema: int = SCHEMA

    def __repr__(self) -> str:
        """Without the key, so that no log or traceback shows it."""
        return f"Enrolment(device={self.device!r}, federation={self.federation!r})"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("device", self.device), ("federation", self.federation)]


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """What every version of the file has."""

    format: Literal["reft-edge enrolment"]
    schema: int


def encode_enrolment(enrolment: Enrolment) -> bytes:
    """The file's content: indented JSON, so that a person sees which device it is for."""
    return msgspec.json.format(msgspec.json.encode(enrolment), indent=2) + b"\n"


def decode_enrolment(data: bytes, *, origin: str = "the enrolment file") -> Enrolment:
    """Read the file's content; `origin` names the file in errors. Raises `ConfigError`."""
    if len(data) > MAX_ENROLMENT_BYTES:
        raise ConfigError(f"{origin}: larger than {MAX_ENROLMENT_BYTES} bytes; this is not an enrolment file")
    try:
        header = msgspec.json.decode(data, type=_Header)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{origin} is not an enrolment file; `reft-edge provision add-device` writes one") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{origin} is cut off, or not an enrolment file; copy it to this device again") from exc
    if header.schema != SCHEMA:
        raise ConfigError(
            f"{origin} has version {header.schema} and this reft-edge reads version {SCHEMA}; "
            "install the same reft-edge here as where the file was made"
        )
    try:
        return msgspec.json.decode(data, type=Enrolment)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        # msgspec names the key and never its value
        raise ConfigError(f"{origin} is damaged: {exc}; make a new one with `reft-edge provision`") from exc
