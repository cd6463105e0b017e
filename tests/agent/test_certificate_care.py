"""What the daemon does about its certificate, beside its main loop."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

import pytest

from reft_edge.agent.certificate_care import EXPLAIN_AGAIN_S, LOOK_EVERY_S, CertificateCare, CertificateRenewed
from reft_edge.errors import RemoteProtocolError

WAIT_S = 20.0


class Scripted:
    """Stands for `Credentials`. Says when it was asked; renewals wait until they are let through."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.explanation = "our certificate expired"
        self.warning = ""
        self.may_answer = threading.Event()
        self.may_answer.set()

    def explain_refusal(self) -> str:
        self.asked.put("explain")
        return self.explanation

    def expiry_warning(self) -> str:
        self.asked.put("expiry")
        return self.warning

    def accept_renewal(self, pem: bytes) -> str:
        self.asked.put(f"renew {pem.decode()}")
        self.may_answer.wait(WAIT_S)
        if pem == b"bad":
            raise RemoteProtocolError("it names another device")
        return "" if pem == b"known" else "our certificate was renewed"

    def next(self) -> str:
        return self.asked.get(timeout=WAIT_S)


@pytest.fixture
def credentials() -> Scripted:
    return Scripted()


@pytest.fixture
def events() -> queue.SimpleQueue[object]:
    return queue.SimpleQueue()


@pytest.fixture
def care(credentials: Scripted, events: queue.SimpleQueue[object]) -> Iterator[CertificateCare]:
    made = CertificateCare(credentials, events, now=0.0, pause_s=0.0)  # type: ignore[arg-type]
    yield made
    made.stop()


def test_a_renewal_is_told_and_a_refused_or_known_one_is_not(
    care: CertificateCare,
    credentials: Scripted,
    events: queue.SimpleQueue[object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for pem in (b"bad", b"known", b"good"):
        care.renew(pem)
        assert credentials.next() == f"renew {pem.decode()}"
    assert isinstance(events.get(timeout=WAIT_S), CertificateRenewed)
    assert events.empty()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "a certificate that came over the network is not used: it names another device",
        "our certificate was renewed",
    ]


def test_of_many_certificates_only_the_last_is_looked_at(care: CertificateCare, credentials: Scripted) -> None:
    credentials.may_answer.clear()
    care.renew(b"first")
    assert credentials.next() == "renew first"
    for number in range(1000):
        care.renew(f"{number}".encode())
    credentials.may_answer.set()
    assert credentials.next() == "renew 999"
    care.tick(0.0)
    assert credentials.next() == "expiry"


def test_a_refusal_is_explained_once_until_the_words_change_or_time_has_passed(
    care: CertificateCare, credentials: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    care.explain("expired", 0.0)
    assert credentials.next() == "explain"
    care.explain("expired", EXPLAIN_AGAIN_S - 1)
    care.explain("revoked", EXPLAIN_AGAIN_S - 1)
    assert credentials.next() == "explain"
    care.explain("revoked", 2 * EXPLAIN_AGAIN_S)
    assert credentials.next() == "explain"
    assert credentials.asked.empty()
    care.connected()
    care.explain("revoked", 2 * EXPLAIN_AGAIN_S)
    assert credentials.next() == "explain"
    care.tick(0.0)  # one after the other: the explanation was logged before this is asked
    assert credentials.next() == "expiry"
    assert [record.getMessage() for record in caplog.records] == ["our certificate expired"] * 2


def test_the_certificates_end_is_looked_at_once_a_day(
    care: CertificateCare, credentials: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    credentials.warning = "our certificate ends tomorrow"
    assert care.look_at == 0.0
    care.tick(0.0)
    assert credentials.next() == "expiry"
    care.tick(LOOK_EVERY_S - 1)
    care.tick(LOOK_EVERY_S)
    assert credentials.next() == "expiry"
    care.renew(b"known")
    assert credentials.next() == "renew known"
    assert [record.getMessage() for record in caplog.records] == ["our certificate ends tomorrow"] * 2


def test_nothing_begins_after_the_end(care: CertificateCare, credentials: Scripted) -> None:
    care.stop()
    care.renew(b"late")
    care.tick(0.0)
    assert credentials.asked.empty()
