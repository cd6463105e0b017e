"""Which devices the coordinator believes, and that forged words change nothing."""

from __future__ import annotations

import itertools
import logging
import queue
import time
from datetime import timedelta

import msgspec
import pytest

from reft_edge.bundle.manifest import BlobRef
from reft_edge.coordinator import events
from reft_edge.coordinator.network import Network
from reft_edge.coordinator.network_events import FromDevice, LinkUp
from reft_edge.coordinator.preparation import prepare
from reft_edge.coordinator.records import DeviceRecord, RoundKey
from reft_edge.coordinator.server import Coordinator
from reft_edge.coordinator.settings import CoordinatorTrust, load_federation
from reft_edge.coordinator.trust import RECHECK_S, DeviceKeys, Trust
from reft_edge.errors import ConfigError, FederationError, RemoteProtocolError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.messages import (
    Accepted,
    Done,
    Failed,
    Measured,
    ProfileAnnouncement,
    UpdateManifest,
    encode,
)
from reft_edge.wire.mqtt import MqttLink
from reft_edge.wire.signing import Sealed, seal, unseal
from reft_edge.wire.topics import device_topic
from tests.certificates import Authority
from tests.coordinator.device import Device, profile
from tests.coordinator.points import ONE_KIND, address, points, write_federation
from tests.trusted import TrustedSite, signing_key

TOPIC = "reft/v1/f/device/d/report"
ANNOUNCEMENT = ProfileAnnouncement(profile=profile("board"), training_samples=1)


@pytest.fixture
def site(tmp_path):
    return TrustedSite(tmp_path / "keys")


class Clock:
    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def settings_of(site):
    return CoordinatorTrust(
        key_file=str(site.coordinator.key_file),
        ca_file=str(site.authority.ca_file),
        crl_file=str(site.authority.revoke()),
    )


def keys_of(site, clock):
    return DeviceKeys(Trust.read(settings_of(site), now=site.authority.now), clock=clock)


def sealed(issued, message=b"{}", topic=TOPIC, *, certificate=False):
    """What the holder of a certificate says, as it is received."""
    if certificate:
        topic = topic.replace("report", "profile")
    pem = issued.certificate_pem.decode() if certificate else ""
    return topic, unseal(topic, seal(topic, message, signing_key(issued), certificate=pem))


def test_a_device_is_believed_once_it_has_shown_its_certificate(site, clock):
    keys, device = keys_of(site, clock), site.device("d")
    assert not keys.knows("d")
    keys.check_profile("d", *sealed(device, certificate=True))
    assert keys.knows("d")
    keys.check_report("d", *sealed(device))
    with pytest.raises(RemoteProtocolError, match="not by the key"):
        keys.check_report("d", *sealed(site.device("e")))
    with pytest.raises(RemoteProtocolError, match="not signed"):
        keys.check_report("d", TOPIC, Sealed(message=b"{}"))


def test_a_profile_of_somebody_else_is_refused_and_changes_nothing(site, clock, tmp_path):
    keys, device = keys_of(site, clock), site.device("d")
    keys.check_profile("d", *sealed(device, certificate=True))
    foreign = Authority(tmp_path / "foreign").issue("d")
    topic, borrowed = sealed(site.device("e"), certificate=True)
    borrowed = Sealed(
        message=borrowed.message, signature=borrowed.signature, certificate=device.certificate_pem.decode()
    )
    for received, words in [
        ((topic, Sealed(message=b"{}")), "no certificate"),
        (sealed(foreign, certificate=True), "another authority"),
        (sealed(site.device("e"), certificate=True), "names 'e' and not 'd'"),
        ((topic, borrowed), "not by the key"),
    ]:
        with pytest.raises(RemoteProtocolError, match=words):
            keys.check_profile("d", *received)
    keys.check_report("d", *sealed(device))


def test_a_device_may_come_with_a_new_key(site, clock):
    keys = keys_of(site, clock)
    keys.check_profile("d", *sealed(site.device("d"), certificate=True))
    replaced = site.authority.issue("d", file_name="replaced")
    keys.check_profile("d", *sealed(replaced, certificate=True))
    keys.check_report("d", *sealed(replaced))
    with pytest.raises(RemoteProtocolError, match="not by the key"):
        keys.check_report("d", *sealed(site.device("d")))


def test_a_revocation_counts_as_soon_as_the_list_has_changed(site, clock):
    keys, device = keys_of(site, clock), site.device("d")
    keys.check_profile("d", *sealed(device, certificate=True))
    site.authority.revoke(device)
    for check, received in (
        (keys.check_report, sealed(device)),
        (keys.check_profile, sealed(device, certificate=True)),
    ):
        with pytest.raises(RemoteProtocolError, match="revoked"):
            check("d", *received)
    site.authority.revoke()
    keys.check_report("d", *sealed(device))


def test_only_a_device_whose_own_certificate_has_ended_is_forgotten(site, clock):
    keys = keys_of(site, clock)
    old, new = site.authority.issue("d"), site.device("d")
    assert not keys.forget_if_ended("d")
    keys.check_profile("d", *sealed(new, certificate=True))
    site.authority.revoke(old)
    with pytest.raises(RemoteProtocolError, match="revoked"):  # somebody plays its old profile again
        keys.check_profile("d", *sealed(old, certificate=True))
    assert not keys.forget_if_ended("d")
    keys.check_report("d", *sealed(new))
    site.authority.revoke(old, new)
    with pytest.raises(RemoteProtocolError, match="revoked"):
        keys.check_report("d", *sealed(new))
    assert keys.forget_if_ended("d")
    assert not keys.knows("d")


def test_a_damaged_or_missing_list_revokes_what_was_revoked_before(site, clock, caplog):
    keys, device = keys_of(site, clock), site.device("d")
    keys.check_profile("d", *sealed(device, certificate=True))
    keys.check_profile("e", *sealed(site.device("e"), topic=TOPIC.replace("/d/", "/e/"), certificate=True))
    path = site.authority.revoke(site.device("e"))
    keys.check_report("d", *sealed(device))
    for spoil in (lambda: path.write_bytes(b"damaged"), path.unlink):
        caplog.clear()
        spoil()
        keys.check_report("d", *sealed(device))
        keys.check_report("d", *sealed(device))
        (line,) = [record.getMessage() for record in caplog.records]
        assert "stays revoked" in line
        with pytest.raises(RemoteProtocolError, match="revoked"):
            keys.check_report("e", *sealed(site.device("e"), topic=TOPIC.replace("/d/", "/e/")))


def test_a_certificate_that_ends_while_its_device_is_connected_ends_its_credit(site, clock):
    keys = keys_of(site, clock)
    device = site.authority.issue("d", ends=timedelta(seconds=RECHECK_S))
    keys.check_profile("d", *sealed(device, certificate=True))
    clock.now += RECHECK_S / 2
    keys.check_report("d", *sealed(device))
    clock.now += RECHECK_S
    with pytest.raises(RemoteProtocolError, match="expired"):
        keys.check_report("d", *sealed(device))


def test_what_the_store_remembers_is_believed_while_it_is_good(site, clock):
    keys, device = keys_of(site, clock), site.device("d")
    pem = device.certificate_pem.decode()

    def recalled(name, certificate):
        record = DeviceRecord(device=name, announcement=ANNOUNCEMENT, seen_at=0.0, certificate=certificate)
        return keys.recall(record)

    assert recalled("d", pem)
    keys.check_report("d", *sealed(device))
    assert not recalled("e", pem)
    assert not recalled("f", "")  # from a time when nothing was signed
    assert not keys.knows("e")
    assert not keys.knows("f")


@pytest.mark.parametrize("name", ["key_file", "ca_file", "crl_file"])
@pytest.mark.parametrize("content", [None, b"", b"\x00nonsense"])
def test_a_file_of_no_use_is_named(site, tmp_path, name, content):
    broken = tmp_path / f"broken-{name}"
    if content is not None:
        broken.write_bytes(content)
        broken.chmod(0o600)
    settings = msgspec.structs.replace(settings_of(site), **{name: str(broken)})
    with pytest.raises(ConfigError, match=f"broken-{name}"):
        Trust.read(settings, now=site.authority.now)


# With a broker that carries everything, as one that was taken over would


@pytest.fixture
def write(tmp_path, own_broker, federation):
    """Write federation.toml and its data; returns the coordinator's preparation."""

    def write(n_devices, *, trust="", **settings):
        path = write_federation(tmp_path, own_broker, federation, n_devices, extra=trust, **settings)
        return prepare(load_federation(path), tmp_path)

    return write


@pytest.fixture
def device(tmp_path, own_broker, federation):
    """Make a device; `identity` is whose certificate and key it uses."""

    def make(name, identity=None, seed=10):
        return Device(
            name,
            points(60, seed),
            broker=address(own_broker),
            federation=federation,
            directory=tmp_path / "devices",
            identity=identity,
        )

    return make


def done(task):
    blob = BlobRef(sha256="0" * 64, size_bytes=100)
    return Done(
        task=task,
        round=1,
        update=UpdateManifest(blob=blob, codec=Int8(), training_samples=1),
        measured=Measured(download_s=0, start_s=0, training_s=0, steps=1, peak_memory_bytes=1),
    )


@ONE_KIND
def test_forged_words_and_forged_devices_change_nothing(
    write,
    site,
    device,
    own_broker,
    federation,
    tmp_path,
    caplog,
):
    preparation = write(2, rounds=2, trust=site.federation_table())
    foreign = Authority(tmp_path / "foreign")
    forger = MqttLink(address(own_broker), client_id="forger", events=queue.SimpleQueue())
    forger.start(wait_s=20)

    def forge(event):
        if isinstance(event, events.RoundStarted):
            for name in ("a", "b"):
                task = RoundKey(run=started[0].run, number=event.round).task(name)
                topic = device_topic(federation, name, "report")
                for report in (Failed(task=task, kind="crashed", reason="forged"), done(task)):
                    forger.publish(topic, encode(report))
                    forger.publish(topic, seal(topic, encode(report), signing_key(site.device("e"))))
                    forger.publish(
                        topic, seal(topic.replace(name, "e"), encode(report), signing_key(site.device(name)))
                    )

    seen, started = [], []

    def listener(event):
        seen.append(event)
        if isinstance(event, events.Started):
            started.append(event)
        forge(event)

    others = [device("unsigned"), device("foreign", foreign.issue("foreign")), device("impostor", site.device("e"))]
    with others[0], others[1], others[2], device("a", site.device("a")), device("b", site.device("b"), seed=11):
        summary = Coordinator(preparation, listener=listener).run()
    forger.stop()
    assert summary.updates == {"merged": 4}
    planned = [event for event in seen if isinstance(event, events.Planned)]
    assert [[item.device for item in event.devices] for event in planned] == [["a", "b"], ["a", "b"]]
    assert not any(other.tasks for other in others)
    assert not [event for event in seen if isinstance(event, events.DeviceProgress) and event.state == "failed"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name in ("unsigned", "foreign", "impostor"):
        assert any(f"device/{name}/profile: dropped" in line for line in warnings)
    forged = [line for line in warnings if "device/a/report: dropped" in line]
    assert len(forged) >= 6  # each round's two reports, forged in three ways; not all of a flood is logged
    for words in ("it is not signed", "its signature is not by the key"):
        assert any(words in line for line in forged)


@ONE_KIND
def test_a_device_that_is_revoked_is_not_waited_for_though_its_connection_lasts(write, site, device):
    preparation = write(2, rounds=2, trust=site.federation_table())
    identity, seen = site.device("b"), []

    def listener(event):
        seen.append(event)
        if isinstance(event, events.RoundStarted):
            site.authority.revoke(identity)

    with device("a", site.device("a")), device("b", identity, seed=11) as revoked:
        summary = Coordinator(preparation, listener=listener).run()
    assert summary.updates == {"merged": 2}
    assert [event.reason for event in seen if isinstance(event, events.DeviceProgress) and event.state == "failed"] == [
        "its certificate is no longer accepted"
    ]
    planned = [event for event in seen if isinstance(event, events.Planned)]
    assert [[item.device for item in event.devices] for event in planned] == [["a", "b"], ["a"]]
    assert len(revoked.tasks) == 1


@ONE_KIND
def test_keys_are_checked_before_anything_begins(write, site):
    site.coordinator.key_file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"coordinator.key.*chmod"):
        write(1, rounds=1, trust=site.federation_table())


@ONE_KIND
def test_a_coordinator_without_keys_takes_devices_that_sign(write, site, device):
    with device("a", site.device("a")):
        summary = Coordinator(write(1, rounds=1)).run()
    assert summary.updates == {"merged": 1}


@ONE_KIND
def test_a_coordinator_with_keys_has_no_use_for_devices_that_do_not_sign(write, site, device):
    preparation = write(1, rounds=1, enrol_wait_s=1, trust=site.federation_table())
    with device("a"), pytest.raises(FederationError, match="0 of 1 devices"):
        Coordinator(preparation).run()


@ONE_KIND
def test_sequences_rise_over_runs_and_restarts_also_when_the_clock_is_set_back(write, site, device):
    preparation = write(1, rounds=2, trust=site.federation_table())

    def stop_at_second_round(event):
        if isinstance(event, events.RoundStarted) and event.round == 2:
            raise KeyboardInterrupt

    with device("a", site.device("a")) as trained:
        with pytest.raises(KeyboardInterrupt):
            Coordinator(preparation, listener=stop_at_second_round).run()
        Coordinator(preparation, clock=lambda: time.time() - 3600).run()
        Coordinator(preparation, clock=lambda: time.time() - 7200, new_run=True).run()
        sequences = [task.sequence for task in trained.tasks]
    assert len(sequences) == 4
    assert all(before < after for before, after in itertools.pairwise(sequences))


@ONE_KIND
def test_after_a_restart_a_report_is_believed_before_the_profile_has_come(
    site,
    clock,
    own_broker,
    federation,
    tmp_path,
    caplog,
):
    caplog.set_level(logging.DEBUG, logger="reft_edge.coordinator.network")
    keys, known = keys_of(site, clock), site.device("d")
    keys.recall(
        DeviceRecord(device="d", announcement=ANNOUNCEMENT, seen_at=0.0, certificate=known.certificate_pem.decode())
    )
    network = Network(
        address(own_broker),
        federation=federation,
        blobs=BlobStore(tmp_path / "blobs"),
        max_parallel_uploads=1,
        keys=keys,
    )
    network.start(wait_s=20)
    link = MqttLink(address(own_broker), client_id="speaker", events=queue.SimpleQueue())
    link.start(wait_s=20)
    assert isinstance(network.inbox.get(timeout=20), LinkUp)
    for name in ("e", "d"):
        topic = device_topic(federation, name, "report")
        link.publish(topic, seal(topic, encode(Accepted(task="t")), signing_key(site.device(name))))
    heard = network.inbox.get(timeout=20)
    assert heard == FromDevice(device="d", message=Accepted(task="t"))
    assert "device/e/report: dropped: its certificate is not known yet" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    link.stop()
    network.stop()
