"""Two slots: what is served is a whole model that was switched to, whatever happens to the device meanwhile."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reft_edge.agent.serving.slots import InstalledModel, Slot, Slots
from reft_edge.errors import BundleError, LocalProtocolError, ResourceError
from tests.agent.serving.failing_disk import FailingDisk


def content(name: str) -> bytes:
    return f"the model {name} ".encode() * 100


def slot(name: str) -> Slot:
    data = content(name)
    return Slot(
        version=f"version-{name}",
        deployment=f"roll-out-{name}",
        model="global",
        precision="int8",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        classes=("cat", "dog"),
    )


def serve(slots: Slots, *names: str) -> None:
    for name in names:
        slots.install(slot(name), content(name))
        slots.switch()


def name_of(model: InstalledModel | None) -> str | None:
    """Which of the models it is; it must be whole."""
    if model is None:
        return None
    assert model.verified()
    name = model.slot.version.removeprefix("version-")
    assert model.path.read_bytes() == content(name)
    return name


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sync is good for is simulated (`failing_disk`), and a busy disk takes its time for each."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path / "serving")


def test_nothing_is_served_where_nothing_was_switched_to(slots: Slots) -> None:
    assert (slots.current(), slots.previous(), slots.installed(), slots.stamp()) == (None, None, None, None)
    slots.install(slot("one"), content("one"))
    assert (slots.current(), name_of(slots.installed())) == (None, "one")
    assert slots.repair() is None
    slots.roll_back()
    assert slots.current() is None


def test_what_is_installed_serves_after_the_switch_and_the_one_before_is_kept(slots: Slots) -> None:
    serve(slots, "one")
    slots.install(slot("two"), content("two"))
    assert (name_of(slots.current()), name_of(slots.installed())) == ("one", "two")
    assert slots.previous() is None
    slots.switch()
    assert (name_of(slots.current()), name_of(slots.previous()), slots.installed()) == ("two", "one", None)
    current = slots.current()
    assert current is not None
    assert current.slot == slot("two")
    with pytest.raises(LocalProtocolError, match="nothing is installed"):
        slots.switch()
    serve(slots, "three")
    assert (name_of(slots.current()), name_of(slots.previous())) == ("three", "two")


def test_a_roll_back_returns_to_what_was_served_before_and_then_to_nothing(slots: Slots) -> None:
    serve(slots, "one", "two")
    slots.roll_back()
    assert (name_of(slots.current()), slots.previous(), slots.installed()) == ("one", None, None)
    serve(slots, "three")
    assert (name_of(slots.current()), name_of(slots.previous())) == ("three", "one")
    slots.roll_back()
    slots.roll_back()
    assert (slots.current(), slots.previous()) == (None, None)
    assert not list(slots.root.rglob("*.onnx"))
    serve(slots, "four")
    assert (name_of(slots.current()), slots.previous()) == ("four", None)


def test_the_stamp_changes_with_every_switch(slots: Slots) -> None:
    serve(slots, "one")
    first = slots.stamp()
    slots.install(slot("two"), content("two"))
    assert slots.stamp() == first
    slots.switch()
    second = slots.stamp()
    slots.roll_back()
    third = slots.stamp()
    assert len({first, second, third}) == 3
    assert slots.stamp() == third


def test_what_was_installed_can_be_switched_to_also_when_what_serves_was_undone_meanwhile(slots: Slots) -> None:
    for name in ("one", "two"):
        serve(slots, name)
        slots.install(slot("next"), content("next"))
        slots.roll_back()
        assert (slots.current(), name_of(slots.installed())) == (None, "next")
        slots.switch()
        assert (name_of(slots.current()), slots.previous()) == ("next", None)
        slots.roll_back()


def test_the_same_model_may_come_again_at_any_time(slots: Slots) -> None:
    serve(slots, "one", "one", "two", "one")
    assert (name_of(slots.current()), name_of(slots.previous())) == ("one", "two")
    slots.install(slot("two"), content("two"))
    assert (name_of(slots.installed()), slots.previous()) == ("two", None)


def test_a_file_is_moved_in_and_one_that_is_another_is_refused(slots: Slots, tmp_path: Path) -> None:
    serve(slots, "one")
    arrived = tmp_path / "arrived.onnx"
    arrived.write_bytes(content("two"))
    slots.install(slot("two"), arrived)
    assert not arrived.exists()
    slots.switch()
    forged = content("three").replace(b"model", b"MODEL")
    with pytest.raises(BundleError, match="global of version-three is not what its SHA-256 says"):
        slots.install(slot("three"), forged)
    arrived.write_bytes(content("three")[:-1])
    with pytest.raises(BundleError, match="not installed"):
        slots.install(slot("three"), arrived)
    assert not arrived.exists()
    assert (name_of(slots.current()), slots.installed()) == ("two", None)


def test_a_disk_that_refuses_leaves_what_is_served(slots: Slots) -> None:
    serve(slots, "one")
    (slots.root / "b").write_bytes(b"a file where a folder should be")
    with pytest.raises(ResourceError, match="check the disk"):
        slots.install(slot("two"), content("two"))
    assert name_of(slots.current()) == "one"


@pytest.mark.parametrize("damage", ["gone", "shorter", "no description", "description is none"])
def test_a_slot_that_is_seen_to_be_damaged_falls_back_to_the_other(slots: Slots, damage: str) -> None:
    serve(slots, "one", "two")
    current = slots.current()
    assert current is not None
    description = current.path.with_name("slot.json")
    if damage == "gone":
        current.path.unlink()
    elif damage == "shorter":
        current.path.write_bytes(content("two")[:-1])
    elif damage == "no description":
        description.unlink()
    else:
        description.write_bytes(b'{"version": 1}')
    assert name_of(slots.current()) == "one"
    said = slots.repair()
    assert said is not None
    assert said.endswith("b is damaged on disk and was removed; serving version-one")
    assert (name_of(slots.current()), slots.previous()) == ("one", None)
    assert slots.repair() is None


def test_a_damaged_slot_is_what_the_next_model_replaces(slots: Slots) -> None:
    serve(slots, "one", "two")
    (slots.root / "b" / "model.onnx").unlink()
    slots.install(slot("three"), content("three"))
    assert name_of(slots.current()) == "one"
    slots.switch()
    assert (name_of(slots.current()), name_of(slots.previous())) == ("three", "one")


def test_bytes_that_changed_on_the_disk_are_found_and_given_up(slots: Slots) -> None:
    serve(slots, "one", "two")
    for folder, served in [("b", "version-one"), ("a", "nothing")]:
        stamp = slots.stamp()
        model = slots.root / folder / "model.onnx"
        model.write_bytes(model.read_bytes().replace(b"model", b"MODEL"))
        current = slots.current()
        assert current is not None
        assert not current.verified()
        said = slots.repair()
        assert said is not None
        assert said.endswith(f"serving {served}")
        assert slots.stamp() != stamp
    assert slots.current() is None


def test_with_both_slots_damaged_nothing_is_served(slots: Slots) -> None:
    serve(slots, "one", "two")
    for model in slots.root.rglob("model.onnx"):
        model.write_bytes(bytes(model.stat().st_size))
    assert slots.repair() is not None
    assert (slots.current(), slots.previous()) == (None, None)


def test_where_the_choice_is_unreadable_a_whole_slot_is_served(slots: Slots) -> None:
    serve(slots, "one")
    (slots.root / "current.json").write_bytes(b"\0" * 20)
    assert name_of(slots.current()) == "one"
    serve(slots, "two")
    assert (name_of(slots.current()), name_of(slots.previous())) == ("two", "one")


def test_what_is_forgotten_is_not_returned_to(slots: Slots) -> None:
    serve(slots, "one", "two")
    slots.forget_previous()
    assert (name_of(slots.current()), slots.previous(), slots.installed()) == ("two", None, None)
    slots.forget_previous()
    slots.roll_back()
    slots.forget_previous()
    assert (slots.current(), slots.previous()) == (None, None)


STEPS = st.sampled_from(
    [*2 * ("install", "switch"), "roll back", "forget", "repair", "spoil current", "cut current", "spoil choice"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, max_size=25))
def test_after_any_steps_a_repaired_slot_serves_what_was_switched_to(steps: list[str]) -> None:
    """`served` is what should serve, the latest last; a spoiled one is given up when it is noticed."""
    with tempfile.TemporaryDirectory() as folder:
        slots, served, installed, number = Slots(Path(folder) / "serving"), [], "", 0
        for step in steps:
            current = slots.current()
            match step:
                case "install":
                    number += 1
                    installed = str(number)
                    slots.install(slot(installed), content(installed))
                    served = served[-1:]
                case "switch" if installed:
                    slots.switch()
                    served, installed = [*served, installed][-2:], ""
                case "roll back":
                    slots.roll_back()
                    served = served[:-1]
                case "forget":
                    slots.forget_previous()
                    served = served[-1:]
                case "repair":
                    assert slots.repair() is None
                case "spoil current" if current is not None:
                    current.path.write_bytes(bytes(current.slot.size_bytes))
                    assert slots.repair() is not None
                    served = served[:-1]
                case "cut current" if current is not None:
                    current.path.write_bytes(b"")
                    served = served[:-1]
                    assert name_of(slots.current()) == (served[-1] if served else None)
                    slots.repair()
                case "spoil choice" if current is not None and not installed and len(served) == 1:
                    (slots.root / "current.json").write_bytes(b"{")
            assert name_of(slots.current()) == (served[-1] if served else None)
            assert name_of(slots.previous()) == (served[-2] if len(served) > 1 else None)


@pytest.mark.parametrize("before", [(), ("one",), ("one", "two"), ("one", "two", "three")])
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("worst", [True, False], ids=["what was not synced is lost", "all is kept"])
def test_power_may_fail_at_any_moment_of_a_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[str, ...], as_file: bool, worst: bool
) -> None:
    arrived = content("new")
    n_changes, at = None, 0
    served = []
    while n_changes is None or at <= n_changes:
        root = tmp_path / f"{at}"
        slots = Slots(root / "serving")
        root.mkdir()
        serve(slots, *before)
        if as_file:
            (root / "file.onnx").write_bytes(arrived)
        disk = FailingDisk(root, monkeypatch)
        with disk.failing(at):
            slots.install(slot("new"), root / "file.onnx" if as_file else arrived)
            slots.switch()
            n_changes = disk.n_changes
        if worst:
            disk.lose_power()
        served.append(name_of(slots.current()))
        assert name_of(slots.previous()) in (None, *before[-2:])
        serve(slots, "later")
        assert (name_of(slots.current()), name_of(slots.previous())) == ("later", served[-1])
        at += 1
    old = before[-1] if before else None
    assert served == [old] * served.index("new") + ["new"] * served.count("new")
    assert n_changes is not None
    assert n_changes > 10


@pytest.mark.parametrize("before", [("one",), ("one", "two")])
@pytest.mark.parametrize("worst", [True, False], ids=["what was not synced is lost", "all is kept"])
def test_power_may_fail_at_any_moment_of_a_roll_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[str, ...], worst: bool
) -> None:
    n_changes, at = None, 0
    served = []
    while n_changes is None or at <= n_changes:
        slots = Slots(tmp_path / f"{at}" / "serving")
        slots.root.parent.mkdir()
        serve(slots, *before)
        disk = FailingDisk(slots.root.parent, monkeypatch)
        with disk.failing(at):
            slots.roll_back()
            n_changes = disk.n_changes
        if worst:
            disk.lose_power()
        served.append(name_of(slots.current()))
        at += 1
    kept = served.count(before[-1])
    assert 0 < kept < len(served)
    assert served == [before[-1]] * kept + [(None, *before)[-2]] * (len(served) - kept)


def test_the_disk_of_these_tests_loses_what_was_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would show nothing."""
    serve(Slots(tmp_path / "serving"), "one")
    disk = FailingDisk(tmp_path, monkeypatch)
    with disk.failing(None):
        current = tmp_path / "serving" / "current.json"
        (tmp_path / "new").write_bytes(msgspec.json.encode({"slot": "b"}))
        (tmp_path / "new").replace(current)
    disk.lose_power()
    assert name_of(Slots(tmp_path / "serving").current()) == "one"
