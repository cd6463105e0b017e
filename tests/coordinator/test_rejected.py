"""Rejected updates that are kept: whole, with their reason, and never more than they may take."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from reft_edge.coordinator.rejected import RejectedNote, RejectedUpdates
from reft_edge.coordinator.rejection_settings import RejectionSettings
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Int8


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def note(blobs, data, *, device="pi-1", round_number=1):
    ref = blobs.put(data)
    return RejectedNote(
        run="run",
        round=round_number,
        device=device,
        task="t",
        variant="0.50",
        reason="too long",
        at=1.0,
        sha256=ref.sha256,
        size_bytes=ref.size_bytes,
        codec=Int8(),
        training_samples=5,
    )


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_an_update_and_its_note_survive_the_sweep_of_the_blobs(tmp_path, blobs):
    kept = RejectedUpdates(tmp_path / "rejected", RejectionSettings())
    written = note(blobs, b"useless")
    path = Path(kept.keep(written, blobs))
    blobs.sweep(set())
    assert path.with_suffix(".update").read_bytes() == b"useless"
    assert msgspec.json.decode(path.read_bytes(), type=RejectedNote) == written
    assert path.name == f"run-r1-pi-1-{written.sha256[:12]}.json"


def test_the_same_bytes_of_another_device_stay_in_the_blob_store(tmp_path, blobs):
    kept = RejectedUpdates(tmp_path / "rejected", RejectionSettings())
    written = note(blobs, b"zeros")
    kept.keep(written, blobs)
    assert blobs.has(written.sha256)


def test_keeping_twice_is_keeping_once(tmp_path, blobs):
    kept = RejectedUpdates(tmp_path / "rejected", RejectionSettings())
    assert kept.keep(note(blobs, b"x"), blobs) == kept.keep(note(blobs, b"x"), blobs)
    assert len(names(kept.directory)) == 2


def test_what_was_never_pulled_leaves_its_note(tmp_path, blobs):
    kept = RejectedUpdates(tmp_path / "rejected", RejectionSettings())
    written = note(blobs, b"huge")
    blobs.remove(written.sha256)
    assert Path(kept.keep(written, blobs)).is_file()
    assert [Path(name).suffix for name in names(kept.directory)] == [".json"]


@pytest.mark.parametrize(
    "settings", [RejectionSettings(keep_updates=3), RejectionSettings(keep_bytes=3 * 6000)], ids=["number", "bytes"]
)
def test_the_oldest_go_first(tmp_path, blobs, settings):
    kept = RejectedUpdates(tmp_path / "rejected", settings)
    for number in range(1, 7):
        path = Path(kept.keep(note(blobs, bytes([number]) * 5000, round_number=number), blobs))
        os.utime(path, ns=(number, number))  # apart, whatever the file system's clock can tell
    assert {name.split("-")[1] for name in names(kept.directory)} == {"r4", "r5", "r6"}
    assert len(names(kept.directory)) == 6


def test_an_update_larger_than_the_limit_leaves_its_note(tmp_path, blobs):
    kept = RejectedUpdates(tmp_path / "rejected", RejectionSettings(keep_bytes=3000))
    assert kept.keep(note(blobs, b"x" * 3001), blobs)
    assert [Path(name).suffix for name in names(kept.directory)] == [".json"]


def test_a_folder_that_cannot_be_written_costs_the_evidence_only(tmp_path, blobs, caplog):
    (tmp_path / "rejected").write_text("a file where the folder should be")
    assert RejectedUpdates(tmp_path / "rejected", RejectionSettings()).keep(note(blobs, b"x"), blobs) == ""
    assert "cannot be kept" in caplog.text
