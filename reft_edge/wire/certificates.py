"""What a certificate is worth: the checks that both ends make of a device's certificate.

There is one private authority, and it signs every certificate itself: nothing here builds chains. Sizes are bounded
before anything is parsed, and the authority's signature is checked before the content is looked at, so that what is
interpreted was written by the authority.

Loads `cryptography` (9 MiB), which the agent's daemon must not: it asks a child process (`agent.certificate_report`).
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.signing import MAX_CERTIFICATE_BYTES

MAX_REVOCATION_LIST_BYTES = 2 * 2**20
"""PEM. Some 40,000 revocations."""

_BEGIN = b"-----BEGIN CERTIFICATE-----"
_END = b"-----END CERTIFICATE-----"

_UNDERSTOOD = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage)
"""Extensions that may be marked critical: those that are checked here."""

# What `cryptography` raises for bytes that are no certificate or key, or for odd ones. It warns of some, and tests turn
# warnings into errors.
_PARSE_ERRORS = (
    ValueError,
    TypeError,
    Warning,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    InternalError,
    UnsupportedAlgorithm,
)


def device_key(certificate_pem: str, *, ca_pem: bytes, crl_pem: bytes | None, device: str, now: datetime) -> bytes:
    """The Ed25519 public key (32 bytes) that the authority certifies for `device`.

    A revocation list past its date still counts: what it names stays revoked, and refusing every device would stop the
    federation for a forgotten timer. The list is a local file, so nobody on the network can hold back a newer one from
    us; `revocation_list_faults` says when to warn. Raises `RemoteProtocolError` with what is wrong with the
    certificate, `ConfigError` when `ca_pem` or `crl_pem` (our own files) are of no use.
    """
    authority = read_authority(ca_pem)
    try:
        certificate = _parse(certificate_pem.encode("ascii", "replace"))
    except ValueError as exc:
        raise RemoteProtocolError(f"the certificate of {device} cannot be used: {exc}") from exc
    faults = _faults(certificate, authority, device, now)
    if not faults and crl_pem is not None:
        revocations = _read_revocations(crl_pem, authority)
        if revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            faults = ["it is revoked"]
    if faults:
        raise RemoteProtocolError(f"the certificate of {device} is not accepted: {'; '.join(faults)}")
    return raw_key(certificate)


def certificate_faults(*, certificate_pem: bytes, key_pem: bytes, ca_pem: bytes, name: str, now: datetime) -> list[str]:
    """What is wrong with our own certificate, for a person; empty when nothing can be seen from here.

    Each entry continues "the certificate ...:". Whether it is revoked is not known here. Raises `ConfigError` when
    `ca_pem` is not an authority's certificate or `key_pem` not an Ed25519 key.
    """
    authority = read_authority(ca_pem)
    key = _read_private_key(key_pem)
    try:
        certificate = _parse(certificate_pem)
    except ValueError as exc:
        return [str(exc)]
    faults = _faults(certificate, authority, name, now)
    try:
        matches = key.public_key() == certificate.public_key()
    except _PARSE_ERRORS:
        matches = False
    if not matches:
        faults.append("it belongs to another private key than the one beside it")
    return faults


def revocation_list_faults(*, crl_pem: bytes, ca_pem: bytes, now: datetime) -> list[str]:
    """Whether the revocation list is past its date: brokers turn everybody away then. Raises `ConfigError`."""
    revocations = _read_revocations(crl_pem, read_authority(ca_pem))
    ends = revocations.next_update_utc
    if ends is not None and ends <= now:
        return [f"it ended on {shown(ends)} ({_clock(now)}); `reft-edge provision` renews it"]
    return []


def certificate_end(certificate_pem: bytes) -> datetime:
    """When the certificate ends. Raises `ConfigError`."""
    try:
        return _parse(certificate_pem).not_valid_after_utc
    except ValueError as exc:
        raise ConfigError(f"the certificate cannot be used: {exc}") from exc


def read_authority(ca_pem: bytes) -> x509.Certificate:
    """The authority's certificate. Raises `ConfigError`."""
    try:
        authority = _parse(ca_pem)
        constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (*_PARSE_ERRORS, x509.ExtensionNotFound) as exc:
        raise ConfigError(f"the authority's certificate (ca_file) cannot be used: {exc}") from exc
    if not constraints.ca:
        raise ConfigError("the certificate in ca_file is not an authority's; use the ca.pem that provision made")
    return authority


def raw_key(certificate: x509.Certificate) -> bytes:
    """The certified Ed25519 key, 32 bytes; only for a certificate that was checked."""
    return certificate.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _parse(pem: bytes) -> x509.Certificate:
    """One certificate and nothing else. Raises `ValueError` with a reason for people."""
    if len(pem) > MAX_CERTIFICATE_BYTES:
        raise ValueError(f"it has {len(pem)} bytes; a certificate has at most {MAX_CERTIFICATE_BYTES}")
    text = pem.strip()
    if not (text.startswith(_BEGIN) and text.endswith(_END) and text.count(b"-----BEGIN") == 1):
        raise ValueError("it is not one certificate in PEM form")
    try:
        certificate = x509.load_pem_x509_certificate(text)
        _ = certificate.extensions, certificate.subject, certificate.public_key()  # these are parsed on demand
    except _PARSE_ERRORS as exc:
        raise ValueError("it is damaged") from exc
    return certificate


def _read_private_key(pem: bytes) -> Ed25519PrivateKey:
    if len(pem) > MAX_CERTIFICATE_BYTES:
        raise ConfigError("the private key file is larger than a key; this is some other file")
    try:
        key = load_pem_private_key(pem, password=None)
    except _PARSE_ERRORS as exc:
        raise ConfigError("the private key cannot be read; expected an Ed25519 key in PEM form (PKCS8)") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("the private key is not an Ed25519 key, which reft-edge signs with")
    return key


def _read_revocations(pem: bytes, authority: x509.Certificate) -> x509.CertificateRevocationList:
    if len(pem) > MAX_REVOCATION_LIST_BYTES:
        raise ConfigError(f"the revocation list (crl_file) is larger than {MAX_REVOCATION_LIST_BYTES} bytes")
    try:
        revocations = x509.load_pem_x509_crl(pem)
        is_ours = revocations.issuer == authority.subject and revocations.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except _PARSE_ERRORS as exc:
        raise ConfigError("the revocation list (crl_file) cannot be read; expected a CRL in PEM form") from exc
    if not is_ours:
        raise ConfigError("the revocation list (crl_file) was not signed by the authority in ca_file")
    return revocations


def _faults(certificate: x509.Certificate, authority: x509.Certificate, name: str, now: datetime) -> list[str]:
    """What is wrong with a certificate that should be for the client `name`; the gravest first."""
    if not _is_signed_by(certificate, authority):
        return ["it was signed by another authority than ca_file's"]
    faults = _date_faults(certificate, now)
    if authority.not_valid_after_utc <= now:
        faults.append(f"its authority ended on {shown(authority.not_valid_after_utc)} ({_clock(now)})")
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name]:
        faults.append(f"it names {', '.join(map(repr, names))[:200] or 'nobody'} and not {name!r}")
    if not _is_for_clients(certificate):
        faults.append("it is not a client's certificate")
    if not isinstance(certificate.public_key(), Ed25519PublicKey):
        faults.append("its key is not an Ed25519 key")
    return faults


def _is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (*_PARSE_ERRORS, InvalidSignature):
        return False
    return True


def _date_faults(certificate: x509.Certificate, now: datetime) -> list[str]:
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < starts:
        return [f"it is not valid before {shown(starts)} ({_clock(now)}; is the clock right?)"]
    if now >= ends:
        return [f"it expired on {shown(ends)} ({_clock(now)})"]
    return []


def _clock(now: datetime) -> str:
    return f"the clock here says {shown(now)}"


def _is_for_clients(certificate: x509.Certificate) -> bool:
    """For authentication of a client, not an authority, and without conditions that we do not know."""
    extensions = certificate.extensions
    if any(extension.critical and not isinstance(extension.value, _UNDERSTOOD) for extension in extensions):
        return False
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return not constraints.ca and ExtendedKeyUsageOID.CLIENT_AUTH in purposes and usage.digital_signature
