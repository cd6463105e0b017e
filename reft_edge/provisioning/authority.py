"""The private certificate authority: keys, certificates, the revocation list. No files and no clock: `now` is given.

One authority signs everything itself; there are no intermediate ones, so nothing builds chains. Its key and the
broker's are ECDSA P-256, which every TLS library speaks. A client's key is Ed25519, because it signs messages too, and
a device's daemon does that without a large library.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from reft_edge.errors import ConfigError

PrivateKey: TypeAlias = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey: TypeAlias = Ed25519PublicKey | ec.EllipticCurvePublicKey

CLOCK_SKEW = timedelta(hours=1)
"""Certificates and revocation lists are valid from a little before they were made, because clocks differ: an hour
covers a clock that was set by hand, and one that missed a change to or from summer time."""

AUTHORITY_NAME = "reft-edge authority"

_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*")


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """What is read from a certificate that this authority made."""

    serial: int
    starts: datetime
    ends: datetime
    public_key: PublicKey
    key_id: bytes
    """The public key as DER: certificates of one identity have it in common."""


@dataclass(frozen=True, kw_only=True)
class RevocationFacts:
    """What is read from a revocation list that this authority made."""

    number: int
    ends: datetime
    serials: frozenset[int]


class Authority:
    """The key that signs, and its certificate.

    `list_url`: where brokers fetch the revocation list, for those that look there and take no file; empty for others.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, *, list_url: str = "") -> None:
        self._key = key
        self.certificate = certificate
        self._list_url = list_url

    @classmethod
    def create(cls, federation: str, *, lifetime: timedelta, now: datetime, list_url: str = "") -> Authority:
        """A new authority; no two have the same key, so certificates of one mean nothing to another."""
        key = ec.generate_private_key(ec.SECP256R1())
        # A common name holds 64 characters, which a federation's name may fill alone.
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
                x509.NameAttribute(NameOID.COMMON_NAME, AUTHORITY_NAME),
            ]
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate, list_url=list_url)

    @classmethod
    def load(cls, *, key_pem: bytes, certificate_pem: bytes, list_url: str = "") -> Authority:
        """Raises `ConfigError` when the two are damaged or do not belong together."""
        try:
            key = load_pem_private_key(key_pem, password=None)
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
            raise ConfigError("the authority's key or certificate is damaged; restore it from a copy") from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError("the authority's key is not the one of its certificate; restore both from one copy")
        return cls(key, certificate, list_url=list_url)

    @property
    def key_pem(self) -> bytes:
        return private_pem(self._key)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue_client(self, name: str, public_key: PublicKey, *, lifetime: timedelta, now: datetime) -> bytes:
        """A certificate (PEM) with which `name` logs in to the broker. Raises `ConfigError`."""
        more = [_distribution_points(self._list_url)] if self._list_url else []
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH
        return self._issue(name, public_key, purpose, *more, lifetime=lifetime, now=now).public_bytes(Encoding.PEM)

    def issue_server(
        self, name: str, hosts: Sequence[str], public_key: PublicKey, *, lifetime: timedelta, now: datetime
    ) -> bytes:
        """A certificate (PEM) for a broker that clients reach as any of `hosts`. Raises `ConfigError`."""
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        purpose = ExtendedKeyUsageOID.SERVER_AUTH
        return self._issue(name, public_key, purpose, names, lifetime=lifetime, now=now).public_bytes(Encoding.PEM)

    def revocation_list(
        self, revoked: Mapping[int, datetime], *, number: int, lifetime: timedelta, now: datetime
    ) -> bytes:
        """The list (PEM) of revoked serial numbers and when each was revoked."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - CLOCK_SKEW)
            .next_update(now + lifetime)
            .add_extension(self._authority_key_identifier(), critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        if self._list_url:
            builder = builder.add_extension(_issuing_point(self._list_url), critical=True)
        for serial, moment in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _issue(
        self,
        name: str,
        public_key: PublicKey,
        purpose: x509.ObjectIdentifier,
        *more: x509.ExtensionType,
        lifetime: timedelta,
        now: datetime,
    ) -> x509.Certificate:
        authority_ends = self.certificate.not_valid_after_utc
        if now >= authority_ends:
            raise ConfigError(
                f"the authority itself ended on {authority_ends:%Y-%m-%d}; "
                "make a new one with `reft-edge provision init --directory` and enrol every device again"
            )
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(min(now + lifetime, authority_ends))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        for extension in more:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())


def new_client_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def new_server_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: PrivateKey) -> bytes:
    """PKCS8 without a passphrase: services start without a person. The file's mode protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_facts(certificate_pem: bytes) -> CertificateFacts:
    """Raises `ValueError` for what is no certificate of ours."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    public_key = certificate.public_key()
    if not isinstance(public_key, Ed25519PublicKey | ec.EllipticCurvePublicKey):
        raise ValueError("a certificate with another kind of key than this authority certifies")
    return CertificateFacts(
        serial=certificate.serial_number,
        starts=certificate.not_valid_before_utc,
        ends=certificate.not_valid_after_utc,
        public_key=public_key,
        key_id=public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    )


def read_revocations(list_pem: bytes) -> RevocationFacts:
    """Raises `ValueError` for what is no revocation list of ours."""
    revocations = x509.load_pem_x509_crl(list_pem)
    ends = revocations.next_update_utc
    try:
        number = revocations.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        number = None
    if ends is None or number is None:
        raise ValueError("a revocation list without a number or an end")
    serials = frozenset(entry.serial_number for entry in revocations)
    return RevocationFacts(number=number, ends=ends, serials=serials)


def check_host(host: str) -> str:
    """Return `host` if clients may connect to it by this name or address; raises `ConfigError` otherwise."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
            raise ConfigError(
                f"broker host {host!r} is neither a host name nor an IP address; write it without a port, "
                "for example broker.local or 192.168.1.10"
            ) from None
    return host


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _distribution_points(url: str) -> x509.CRLDistributionPoints:
    where = [x509.UniformResourceIdentifier(url)]
    point = x509.DistributionPoint(full_name=where, relative_name=None, reasons=None, crl_issuer=None)
    return x509.CRLDistributionPoints([point])


def _issuing_point(url: str) -> x509.IssuingDistributionPoint:
    return x509.IssuingDistributionPoint(
        full_name=[x509.UniformResourceIdentifier(url)],
        relative_name=None,
        only_contains_user_certs=False,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
