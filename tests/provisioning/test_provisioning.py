"""The provisioning directory: what is issued, what is kept secret, and what an interruption leaves behind."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from reft_edge.errors import ConfigError, ResourceError
from reft_edge.provisioning import files
from reft_edge.provisioning.authority import Authority, check_host, new_client_key, read_revocations
from reft_edge.provisioning.directory import Provisioning, opened
from reft_edge.provisioning.issuing import BrokerPlaces, add_device, begin, device_names, renew, revoke
from reft_edge.provisioning.settings import ProvisioningSettings, read_settings
from reft_edge.wire.certificates import certificate_faults, device_key
from reft_edge.wire.enrolment import Enrolment, decode_enrolment
from reft_edge.wire.signing import SigningKey, VerifyKey, seal, unseal, verify

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SETTINGS = ProvisioningSettings(federation="birds", broker_hosts=("broker.local", "192.168.1.10", "::1"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be copied."""
    root = tmp_path_factory.mktemp("begun") / "provisioning"
    begin(root, SETTINGS, now=NOW)
    return root


@pytest.fixture
def root(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "provisioning")


def add(root: Path, device: str, *, replace: bool = False, now: datetime = NOW) -> Enrolment:
    with opened(root, now=now) as provisioning:
        return decode_enrolment(add_device(provisioning, device, replace=replace, now=now).read_bytes())


def take_back(root: Path, device: str, *, now: datetime = NOW) -> bool:
    with opened(root, now=now) as provisioning:
        return revoke(provisioning, device, now=now)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is issued.


def test_an_enrolment_holds_a_client_certificate_for_this_device_and_its_key(root: Path) -> None:
    enrolment = add(root, "pi-01")
    faults = certificate_faults(
        certificate_pem=enrolment.certificate.encode(),
        key_pem=enrolment.key.encode(),
        ca_pem=enrolment.ca.encode(),
        name="pi-01",
        now=NOW,
    )
    assert faults == []
    assert (enrolment.federation, enrolment.broker_host, enrolment.broker_port) == ("birds", "broker.local", 8883)


def test_what_a_device_signs_is_verified_with_the_key_in_its_certificate(root: Path) -> None:
    enrolment = add(root, "pi-01")
    crl = (root / "coordinator" / "revoked.pem").read_bytes()
    raw = device_key(enrolment.certificate, ca_pem=enrolment.ca.encode(), crl_pem=crl, device="pi-01", now=NOW)
    sealed = unseal("a/topic", seal("a/topic", b"{}", SigningKey.from_pem(enrolment.key.encode())))
    verify("a/topic", sealed, VerifyKey.from_raw(raw))


def test_the_coordinators_key_that_a_device_pins_is_the_one_that_signs(root: Path) -> None:
    pinned = VerifyKey.from_pem(add(root, "pi-01").coordinator_key.encode())
    assert SigningKey.read(root / "coordinator" / "coordinator.key").public.raw == pinned.raw


def test_the_brokers_certificate_names_all_its_hosts_and_is_for_servers_only(root: Path) -> None:
    certificate = x509.load_pem_x509_certificate((root / "broker" / "broker.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.local"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.168.1.10", "::1"]
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_no_certificate_outlives_its_authority_and_none_is_made_after_it() -> None:
    authority = Authority.create("f", lifetime=10 * DAY, now=NOW)
    key = new_client_key().public_key()
    certificate = x509.load_pem_x509_certificate(authority.issue_client("a", key, lifetime=99 * DAY, now=NOW))
    assert certificate.not_valid_after_utc == NOW + 10 * DAY
    with pytest.raises(ConfigError, match="the authority itself ended on 2026-05-11"):
        authority.issue_client("a", key, lifetime=DAY, now=NOW + 11 * DAY)


def test_a_list_that_brokers_fetch_is_named_in_clients_certificates_and_in_itself(tmp_path: Path) -> None:
    url = "http://broker.local/revoked.pem"
    begin(tmp_path / "provisioning", msgspec.structs.replace(SETTINGS, revocation_list_url=url), now=NOW)
    certificate = x509.load_pem_x509_certificate(add(tmp_path / "provisioning", "pi-01").certificate.encode())
    (point,) = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    revocations = x509.load_pem_x509_crl((tmp_path / "provisioning" / "broker" / "revoked.pem").read_bytes())
    issuing = revocations.extensions.get_extension_for_class(x509.IssuingDistributionPoint).value
    assert point.full_name == issuing.full_name == [x509.UniformResourceIdentifier(url)]


@pytest.mark.parametrize(
    "name", ["", "a/b", "+", "#", "a b", "a\n", "ä", "x" * 65, "../x", "broker", "coordinator", "Provisioner"]
)
def test_a_name_that_could_break_out_of_its_topic_or_means_something_else_is_refused(root: Path, name: str) -> None:
    before = tree(root)
    with pytest.raises(ConfigError, match="device"):
        add(root, name)
    assert tree(root) == before


@pytest.mark.parametrize("host", ["", "a b", "host:8883", "mqtts://host", "-host", "1.2.3", "a..b", "[::1]", "a" * 254])
def test_a_host_that_no_certificate_could_name_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="without a port"):
        check_host(host)


# Beginning.


def test_an_existing_directory_is_refused_and_left_as_it_is(root: Path) -> None:
    before = tree(root)
    with pytest.raises(ConfigError, match="exists already and was left as it is"):
        begin(root, SETTINGS, now=NOW)
    assert tree(root) == before


def test_settings_that_were_written_are_read_back(root: Path) -> None:
    assert read_settings(root / "provisioning.toml") == SETTINGS


def test_a_beginning_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_edge.provisioning.issuing.filled_template", _disk_full)
    with pytest.raises(ResourceError):
        begin(tmp_path / "provisioning", SETTINGS, now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_configuration_names_the_folders_where_the_files_will_be(tmp_path: Path) -> None:
    places = BrokerPlaces(files=Path("/etc/somewhere"), state=Path("/var/somewhere"))
    begin(tmp_path / "provisioning", SETTINGS, places=places, now=NOW)
    text = (tmp_path / "provisioning" / "broker" / "mosquitto.conf").read_text()
    assert "\nkeyfile /etc/somewhere/broker.key\n" in text
    assert "\npersistence_location /var/somewhere/\n" in text
    assert not (tmp_path / "provisioning" / "broker" / "state").exists()


# Secrets.


def test_keys_are_readable_by_their_owner_only_whatever_the_umask(
    tmp_path: Path,
) -> None:
    before = os.umask(0)
    try:
        begin(tmp_path / "provisioning", SETTINGS, now=NOW)
        add(tmp_path / "provisioning", "pi-01")
    finally:
        os.umask(before)
    for path in (tmp_path / "provisioning", *(tmp_path / "provisioning").rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif b"PRIVATE KEY" in path.read_bytes():
            assert mode == 0o600, path
        else:
            assert mode & 0o022 == 0, path
    secret = [path.name for path in (tmp_path / "provisioning").rglob("*") if path.is_file() and _is_secret(path)]
    assert sorted(secret) == ["broker.key", "ca.key", "canary.pem", "coordinator.key", "pi-01.enrol"]


def test_a_key_never_shows_in_a_representation(root: Path) -> None:
    enrolment = add(root, "pi-01")
    secret = enrolment.key.splitlines()[1]
    provisioning = Provisioning.read(root)
    assert secret not in repr(enrolment)
    assert secret not in repr(provisioning.ledger)
    assert secret.encode() not in (root / "ledger.json").read_bytes()


# Taking back.


def test_a_name_that_exists_is_refused_with_the_way_out(root: Path) -> None:
    first = add(root, "pi-01")
    before = tree(root)
    with pytest.raises(ConfigError, match="--replace"):
        add(root, "pi-01")
    assert tree(root) == before
    second = add(root, "pi-01", replace=True)
    assert second.key != first.key
    crl = (root / "broker" / "revoked.pem").read_bytes()
    for enrolment, is_good in ((first, False), (second, True)):
        serial = x509.load_pem_x509_certificate(enrolment.certificate.encode()).serial_number
        assert (serial in read_revocations(crl).serials) is not is_good


def test_a_revocation_covers_every_certificate_of_the_key(root: Path) -> None:
    first = add(root, "pi-01")
    with opened(root, now=NOW) as provisioning:
        (second,) = renew(provisioning, ["pi-01"], within=DAY, now=NOW)
    assert take_back(root, "pi-01")
    serials = read_revocations((root / "coordinator" / "revoked.pem").read_bytes()).serials
    assert x509.load_pem_x509_certificate(first.certificate.encode()).serial_number in serials
    assert second.facts.serial in serials


def test_revoking_twice_does_not_date_the_list_anew(root: Path) -> None:
    add(root, "pi-01")
    assert take_back(root, "pi-01")
    before = (root / "broker" / "revoked.pem").read_bytes()
    assert not take_back(root, "pi-01", now=NOW + DAY)
    assert (root / "broker" / "revoked.pem").read_bytes() == before


@pytest.mark.parametrize("name", ["broker", "coordinator"])
def test_what_every_device_trusts_cannot_be_revoked(root: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="enrol the devices again"):
        take_back(root, name)


def test_a_misspelt_device_is_answered_with_the_nearest(root: Path) -> None:
    add(root, "pi-kitchen")
    with pytest.raises(ConfigError, match="did you mean 'pi-kitchen'"):
        take_back(root, "pi-kitchn")


def test_a_list_names_no_certificate_that_has_ended(root: Path) -> None:
    add(root, "pi-01")
    take_back(root, "pi-01")
    later = NOW + 400 * DAY
    with opened(root, now=later) as provisioning:
        assert provisioning.ledger.revoked(later) == {}
        assert provisioning.ledger.newest("pi-01") is not None, "people can still see it"


def test_list_numbers_rise_even_when_the_clock_goes_back(root: Path) -> None:
    numbers = []
    for moment in (NOW + DAY, NOW, NOW - DAY):
        with opened(root, now=moment) as provisioning:
            provisioning.write_revocation_list(moment)
            facts = provisioning.revocation_facts()
            assert facts is not None
            numbers.append(facts.number)
    assert numbers == sorted(set(numbers))


# Renewing.


def test_renewal_takes_what_ends_soon_and_keeps_the_keys(root: Path) -> None:
    early = add(root, "early")
    add(root, "late", now=NOW + 200 * DAY)
    when = NOW + 310 * DAY
    with opened(root, now=when) as provisioning:
        renewed = renew(provisioning, [], within=60 * DAY, now=when)
        assert [entry.name for entry in renewed] == ["broker", "coordinator", "early"]
        assert [entry.name for entry in provisioning.ledger.unsettled_renewals(when)] == ["early"]
        assert renew(provisioning, [], within=60 * DAY, now=when) == []
    faults = certificate_faults(
        certificate_pem=renewed[-1].certificate.encode(),
        key_pem=early.key.encode(),
        ca_pem=early.ca.encode(),
        name="early",
        now=when + 300 * DAY,
    )
    assert faults == []
    assert (root / "broker" / "broker.pem").read_text() == renewed[0].certificate
    assert (root / "coordinator" / "coordinator.pem").read_text() == renewed[1].certificate


def test_a_renewal_is_published_until_the_certificate_before_it_has_ended(root: Path) -> None:
    add(root, "pi-01")
    when = NOW + 350 * DAY
    with opened(root, now=when) as provisioning:
        renew(provisioning, ["pi-01"], within=DAY, now=when)
        ledger = provisioning.ledger
    assert [entry.name for entry in ledger.unsettled_renewals(NOW + 364 * DAY)] == ["pi-01"]
    assert ledger.unsettled_renewals(NOW + 366 * DAY) == []


def test_a_revoked_device_is_not_renewed(root: Path) -> None:
    add(root, "pi-01")
    take_back(root, "pi-01")
    with opened(root, now=NOW) as provisioning:
        assert "pi-01" not in [entry.name for entry in renew(provisioning, [], within=999 * DAY, now=NOW)]
        with pytest.raises(ConfigError, match="--replace"):
            renew(provisioning, ["pi-01"], within=DAY, now=NOW)


def test_the_ledger_forgets_renewed_certificates_that_have_ended(root: Path) -> None:
    add(root, "pi-01")
    for years in range(1, 6):
        when = NOW + years * 360 * DAY
        with opened(root, now=when) as provisioning:
            renew(provisioning, ["pi-01"], within=DAY, now=when)
    names = [entry.name for entry in Provisioning.read(root).ledger.entries]
    assert names.count("pi-01") == 2


# Interruptions.


class Cut(BaseException):
    """The process is gone."""


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ends the process, as it were, at the n-th step that touches the disk: before, after, or while a name is given."""
    steps = iter(())

    def step() -> None:
        if next(steps, None) is Cut:
            raise Cut

    def write_pending(path: Path, data: bytes, mode: int) -> Path:
        step()
        pending = original_write(path, data, mode)
        step()
        return pending

    def settle(path: Path) -> None:
        original_settle(path)
        step()

    original_write, original_settle = files.write_pending, files.settle
    for module in (files, "reft_edge.provisioning.directory"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.write_pending", write_pending)
        monkeypatch.setattr(f"{target}.settle", settle)

    def arm(n: int) -> None:
        nonlocal steps
        steps = iter([None] * n + [Cut])

    yield arm
    steps = iter(())


def _replace(root: Path) -> None:
    add(root, "pi-01", replace=True)


def _add_second(root: Path) -> None:
    if Provisioning.read(root).ledger.newest("pi-02") is None:
        add(root, "pi-02")


def _revoke_first(root: Path) -> None:
    take_back(root, "pi-01")


def _renew_all(root: Path) -> None:
    with opened(root, now=NOW + 340 * DAY) as provisioning:
        renew(provisioning, [], within=60 * DAY, now=NOW + 340 * DAY)


@pytest.mark.parametrize("command", [_add_second, _replace, _revoke_first, _renew_all])
def test_a_command_that_is_interrupted_anywhere_is_completed_or_undone_by_the_next(
    begun: Path, tmp_path: Path, cut_after: Callable[[int], None], command: Callable[[Path], None]
) -> None:
    n_cuts = 0
    for n in range(40):
        root = shutil.copytree(begun, tmp_path / str(n))
        add(root, "pi-01")
        cut_after(n)
        try:
            command(root)
        except Cut:
            n_cuts += 1
            _check_consistent(root)
            command(root)
            _check_consistent(root)
        else:
            cut_after(1_000_000)
            break
    assert n_cuts >= 3


def _check_consistent(root: Path) -> None:
    """After whatever came before, the next command finds everything as the ledger says."""
    when = NOW + 340 * DAY
    with opened(root, now=when) as provisioning:
        ledger, paths = provisioning.ledger, provisioning.paths
    assert not list(root.rglob(".*"))
    for name in ("broker", "coordinator"):
        entry = ledger.active(name)
        assert entry is not None
        assert (root / name / f"{name}.pem").read_text() == entry.certificate
    facts = read_revocations((root / "broker" / "revoked.pem").read_bytes())
    assert facts.serials >= set(ledger.revoked(when))
    assert (root / "broker" / "revoked.pem").read_bytes() == (root / "coordinator" / "revoked.pem").read_bytes()
    assert {path.stem for path in paths.devices.iterdir()} == set(device_names(ledger))
    for device in device_names(ledger):
        enrolment = decode_enrolment(paths.enrolment(device).read_bytes())
        keys = [entry for entry in ledger.identities() if entry.certificate == enrolment.certificate]
        in_use = [entry for entry in ledger.entries if entry.certificate == enrolment.certificate]
        assert keys or in_use, "an enrolment file that the ledger does not know could never be revoked"
        assert ledger.newest(device).facts.key_id == in_use[0].facts.key_id  # type: ignore[union-attr]


def test_an_interrupted_beginning_does_not_stand_in_the_way_of_the_next(
    tmp_path: Path, cut_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_args, **_options: None)  # a killed process cleans nothing up
        cut_after(7)
        with pytest.raises(Cut):
            begin(tmp_path / "provisioning", SETTINGS, now=NOW)
    assert not (tmp_path / "provisioning").exists()
    cut_after(1_000_000)
    begin(tmp_path / "provisioning", SETTINGS, now=NOW)
    assert [path.name for path in tmp_path.iterdir()] == ["provisioning"]


def test_commands_at_the_same_time_follow_one_another(root: Path) -> None:
    names = [f"pi-{number}" for number in range(6)]
    threads = [threading.Thread(target=add, args=(root, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(device_names(Provisioning.read(root).ledger)) == names


def test_a_command_that_finds_another_at_work_gives_up_and_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_WAIT_S", 0.0)
    with opened(root, now=NOW), pytest.raises(ConfigError, match="another `reft-edge provision` works"):
        add(root, "pi-01")


# Damage.


@pytest.mark.parametrize("name", ["ledger.json", "authority/ca.key", "authority/ca.pem", "coordinator/coordinator.key"])
def test_a_damaged_or_missing_file_is_one_line_that_names_it_or_its_cure(root: Path, name: str) -> None:
    for damage in (b"", b"garbage", None):
        original = (root / name).read_bytes()
        (root / name).unlink() if damage is None else (root / name).write_bytes(damage)
        with pytest.raises(ConfigError, match=r"copy|is not a provisioning directory") as caught:
            add(root, "pi-01")
        assert "\n" not in str(caught.value)
        (root / name).write_bytes(original)


def test_a_ledger_of_a_later_version_is_refused(root: Path) -> None:
    document = msgspec.json.decode((root / "ledger.json").read_bytes())
    (root / "ledger.json").write_bytes(msgspec.json.encode({**document, "schema": 99}))
    with pytest.raises(ConfigError, match="version 99"):
        Provisioning.read(root)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("port = 0", "port"),
        ("broker_hosts = []", "broker_hosts"),
        ('broker_hosts = ["a:1"]', "without a port"),
        ('revocation_list_url = "revoked.pem"', "revocation_list_url"),
        ("renew_before_days = 365", "less than certificate_days"),
        ("certificate_day = 3", "did you mean 'certificate_days'"),
    ],
)
def test_a_wrong_setting_is_one_line(root: Path, line: str, words: str) -> None:
    path = root / "provisioning.toml"
    key = line.split(" = ")[0]
    lines = [each for each in path.read_text().splitlines() if not each.startswith(f"{key} =")]
    at = lines.index("[lifetimes]") + ("days" in key or "day" in key)
    path.write_text("\n".join([*lines[:at], line, *lines[at:]]))
    with pytest.raises(ConfigError, match=words):
        read_settings(path)


def _disk_full(*_arguments: object) -> str:
    raise ResourceError("no room")


def _is_secret(path: Path) -> bool:
    return b"PRIVATE KEY" in path.read_bytes()
