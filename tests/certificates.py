"""A certificate authority for tests, which also issues what no real one should; and a broker that asks for its work."""

from __future__ import annotations

import getpass
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey: TypeAlias = Ed25519PrivateKey | ec.EllipticCurvePrivateKey

DAY = timedelta(days=1)

_BROKER = """\
user {user}
listener {port} 127.0.0.1
allow_anonymous true
cafile {directory}/ca.crt
certfile {directory}/{server}.crt
keyfile {directory}/{server}.key
crlfile {directory}/{revoked}
require_certificate true
"""


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate, its key and the files they were written to."""

    certificate: x509.Certificate
    key: PrivateKey
    certificate_file: Path
    key_file: Path

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return private_pem(self.key)


class Authority:
    """Writes `<name>.crt` (its own), `<device>.crt` with `<device>.key`, and `<name>.crl` into `directory`.

    Times are relative to `now`, which is the real one unless given.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "ca",
        *,
        now: datetime | None = None,
        starts: timedelta = -DAY,
        ends: timedelta = DAY,
        is_ca: bool = True,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.now = now or datetime.now(UTC)
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _common_name(name)
        usage = _key_usage(digital_signature=False, key_cert_sign=True, crl_sign=True)
        extensions = [(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), True), (usage, True)]
        self.certificate = self._sign(self._subject, self._key, extensions, starts=starts, ends=ends)
        self.ca_file = directory / f"{name}.crt"
        self.ca_file.write_bytes(self.ca_pem)

    @property
    def ca_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        name: str,
        *,
        starts: timedelta = -DAY,
        ends: timedelta = DAY,
        key: PrivateKey | None = None,
        client: bool = True,
        is_ca: bool = False,
        file_name: str | None = None,
        more: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    ) -> Issued:
        """A client's certificate, with an Ed25519 key unless given one. `more`: extensions, and whether critical."""
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        return self._issue(name, key or Ed25519PrivateKey.generate(), purpose, starts, ends, is_ca, file_name, more)

    def issue_server(
        self,
        name: str = "server",
        *,
        hosts: tuple[str, ...] = ("localhost",),
        starts: timedelta = -DAY,
        ends: timedelta = DAY,
    ) -> Issued:
        """A broker's certificate for the host names `hosts`."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
        return self._issue(name, key, ExtendedKeyUsageOID.SERVER_AUTH, starts, ends, False, None, ((names, False),))

    def revoke(self, *revoked: Issued, starts: timedelta = -DAY, ends: timedelta = DAY) -> Path:
        """Write the revocation list, which names exactly these. Returns its file."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._subject)
            .last_update(self.now + starts)
            .next_update(self.now + ends)
        )
        for each in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(each.certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(self.now + starts).build())
        path = self.directory / f"{self._name}.crl"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return path

    def _issue(
        self,
        name: str,
        key: PrivateKey,
        purpose: x509.ObjectIdentifier,
        starts: timedelta,
        ends: timedelta,
        is_ca: bool,
        file_name: str | None,
        more: tuple[tuple[x509.ExtensionType, bool], ...],
    ) -> Issued:
        extensions = [
            (x509.BasicConstraints(ca=is_ca, path_length=None), True),
            (_key_usage(digital_signature=True, key_cert_sign=is_ca, crl_sign=False), True),
            (x509.ExtendedKeyUsage([purpose]), False),
            *more,
        ]
        certificate = self._sign(_common_name(name), key, extensions, starts=starts, ends=ends)
        stem = file_name or name
        issued = Issued(
            certificate=certificate,
            key=key,
            certificate_file=self.directory / f"{stem}.crt",
            key_file=self.directory / f"{stem}.key",
        )
        issued.certificate_file.write_bytes(issued.certificate_pem)
        issued.key_file.write_bytes(issued.key_pem)
        issued.key_file.chmod(0o600)
        return issued

    def _sign(
        self,
        subject: x509.Name,
        key: PrivateKey,
        extensions: list[tuple[x509.ExtensionType, bool]],
        *,
        starts: timedelta,
        ends: timedelta,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now + starts)
            .not_valid_after(self.now + ends)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())


@contextmanager
def tls_broker(
    program: str, directory: Path, *, server: str = "server", revoked: str = "ca.crl", port: int | None = None
) -> Iterator[int]:
    """A Mosquitto that takes no client without a certificate; yields its port. An authority's files in `directory`:

    `ca.crt`, the broker's `<server>.crt` with its key, and the revocation list `revoked`.
    """
    port = port or free_port()
    configuration = directory / f"{port}.conf"
    configuration.write_text(
        _BROKER.format(user=getpass.getuser(), port=port, directory=directory, server=server, revoked=revoked)
    )
    with subprocess.Popen([program, "-c", str(configuration)], stderr=subprocess.DEVNULL) as broker:
        try:
            _wait_until_listening(port, broker)
            yield port
        finally:
            broker.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_listening(port: int, broker: subprocess.Popen[bytes]) -> None:
    while broker.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=20.0).close()
        except ConnectionRefusedError:
            continue
        return
    raise RuntimeError("mosquitto does not start")


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*, digital_signature: bool, key_cert_sign: bool, crl_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
