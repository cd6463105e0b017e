"""Certificates against an authority whose today is fixed."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.certificates import (
    MAX_CERTIFICATE_BYTES,
    certificate_end,
    certificate_faults,
    device_key,
    revocation_list_faults,
)
from tests.certificates import DAY, Authority, Issued

NOW = datetime(2031, 5, 6, 7, 8, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, now=NOW, ends=10 * DAY)


@pytest.fixture
def pi(authority: Authority) -> Issued:
    return authority.issue("pi-1")


def key_of(issued: Issued, authority: Authority, *, crl: Path | None = None, now: datetime = NOW) -> bytes:
    crl_pem = None if crl is None else crl.read_bytes()
    text = issued.certificate_pem.decode()
    return device_key(text, ca_pem=authority.ca_pem, crl_pem=crl_pem, device="pi-1", now=now)


def faults_of(issued: Issued, authority: Authority, *, key: Issued | None = None, now: datetime = NOW) -> list[str]:
    return certificate_faults(
        certificate_pem=issued.certificate_pem,
        key_pem=(key or issued).key_pem,
        ca_pem=authority.ca_pem,
        name="pi-1",
        now=now,
    )


def test_a_good_certificate_gives_the_devices_public_key(authority: Authority) -> None:
    issued = authority.issue("pi-1")
    raw = issued.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert key_of(issued, authority, crl=authority.revoke()) == raw
    assert faults_of(issued, authority) == []
    assert certificate_end(issued.certificate_pem) == NOW + DAY


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("another device", "it names 'pi-2' and not 'pi-1'"),
        ("expired", "it expired on 2031-05-05 07:08 UTC .the clock here says 2031-05-06 07:08 UTC"),
        (
            "early",
            "it is not valid before 2031-05-06 19:08 UTC .the clock here says 2031-05-06 07:08 UTC; is the clock",
        ),
        ("server", "it is not a client's certificate"),
        ("an authority", "it is not a client's certificate"),
        ("with a condition", "it is not a client's certificate"),
        ("without an Ed25519 key", "its key is not an Ed25519 key"),
        ("another authority", "it was signed by another authority"),
        ("an authority of the same name", "it was signed by another authority"),
    ],
)
def test_each_fault_is_named_at_both_ends(authority: Authority, tmp_path: Path, kind: str, words: str) -> None:
    issued = {
        "another device": lambda: authority.issue("pi-2"),
        "expired": lambda: authority.issue("pi-1", starts=-3 * DAY, ends=-DAY),
        "early": lambda: authority.issue("pi-1", starts=DAY / 2),
        "server": lambda: authority.issue("pi-1", client=False),
        "an authority": lambda: authority.issue("pi-1", is_ca=True),
        "with a condition": lambda: authority.issue("pi-1", more=((x509.OCSPNoCheck(), True),)),
        "without an Ed25519 key": lambda: authority.issue("pi-1", key=ec.generate_private_key(ec.SECP256R1())),
        "another authority": lambda: Authority(tmp_path / "b", "other", now=NOW).issue("pi-1"),
        "an authority of the same name": lambda: Authority(tmp_path / "b", now=NOW).issue("pi-1"),
    }[kind]()
    with pytest.raises(RemoteProtocolError, match=words):
        key_of(issued, authority)
    if kind == "without an Ed25519 key":
        with pytest.raises(ConfigError, match="not an Ed25519 key"):
            faults_of(issued, authority)
    else:
        assert re.search(words, "; ".join(faults_of(issued, authority)))


def test_our_end_sees_that_the_key_is_another(authority: Authority) -> None:
    assert faults_of(authority.issue("pi-1"), authority, key=authority.issue("pi-1")) == [
        "it belongs to another private key than the one beside it"
    ]


def test_an_authority_past_its_date_certifies_nothing(authority: Authority) -> None:
    issued = authority.issue("pi-1", ends=99 * DAY)
    with pytest.raises(RemoteProtocolError, match="its authority ended on 2031-05-16"):
        key_of(issued, authority, now=NOW + 11 * DAY)


def test_a_revoked_certificate_is_refused_also_by_a_list_past_its_date(authority: Authority) -> None:
    good, bad = authority.issue("pi-1"), authority.issue("pi-1")
    crl = authority.revoke(bad, ends=-DAY / 2)
    assert len(key_of(good, authority, crl=crl)) == 32
    with pytest.raises(RemoteProtocolError, match="it is revoked"):
        key_of(bad, authority, crl=crl)
    faults = revocation_list_faults(crl_pem=crl.read_bytes(), ca_pem=authority.ca_pem, now=NOW)
    assert faults == [
        "it ended on 2031-05-05 19:08 UTC (the clock here says 2031-05-06 07:08 UTC); `reft-edge provision` renews it"
    ]
    assert not revocation_list_faults(crl_pem=authority.revoke().read_bytes(), ca_pem=authority.ca_pem, now=NOW)


def test_files_of_our_own_that_are_of_no_use_are_settings_errors(authority: Authority, tmp_path: Path) -> None:
    issued = authority.issue("pi-1")
    foreign = Authority(tmp_path / "b", now=NOW).revoke()
    with pytest.raises(ConfigError, match=r"revocation list .* not signed by the authority"):
        key_of(issued, authority, crl=foreign)
    foreign.write_bytes(b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
    with pytest.raises(ConfigError, match=r"revocation list .* cannot be read"):
        key_of(issued, authority, crl=foreign)
    with pytest.raises(ConfigError, match="not an authority's"):
        key_of(issued, Authority(tmp_path / "c", now=NOW, is_ca=False))


@pytest.mark.parametrize("text", ["", "x" * MAX_CERTIFICATE_BYTES, "-----BEGIN CERTIFICATE-----", "\ud800", "ü" * 9000])
def test_what_is_no_certificate_is_refused(authority: Authority, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="certificate of pi-1 cannot be used"):
        device_key(text, ca_pem=authority.ca_pem, crl_pem=None, device="pi-1", now=NOW)


def test_a_chain_is_not_looked_at(authority: Authority) -> None:
    issued = authority.issue("pi-1")
    chain = (issued.certificate_pem + authority.ca_pem).decode()
    with pytest.raises(RemoteProtocolError, match="not one certificate"):
        device_key(chain, ca_pem=authority.ca_pem, crl_pem=None, device="pi-1", now=NOW)


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_a_changed_certificate_is_refused_or_harmless(
    authority: Authority, pi: Issued, changes: list[tuple[int, int]]
) -> None:
    """Any bytes changed in the DER: refused with the documented error, or still what the authority signed."""
    der = bytearray(pi.certificate.public_bytes(Encoding.DER))
    for place, value in changes:
        der[place % len(der)] = value
    body = base64.encodebytes(bytes(der)).decode()
    text = f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
    try:
        raw = device_key(text, ca_pem=authority.ca_pem, crl_pem=None, device="pi-1", now=NOW)
    except RemoteProtocolError:
        return
    assert raw == pi.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
