"""Rejected updates, kept apart for a person to look at: `<run>-r<round>-<device>-<hash>.update` and `.json` beside it.

The blob store forgets updates when a round is over; these stay, bounded in number and bytes, the oldest going first. An
update that was refused before it was pulled leaves its `.json` alone. A disk that does not take them costs the
evidence, not the round.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from reft_edge.coordinator.rejection_settings import RejectionSettings
from reft_edge.wire.codec_names import Codec

if TYPE_CHECKING:
    from reft_edge.coordinator.records import UpdateRecord
    from reft_edge.wire.blobs import BlobStore

HASH_DIGITS = 12
"""Of the update's SHA-256 in the file's name: enough to tell apart what one device sent in one round."""

UPDATE_SUFFIX = ".update"
NOTE_SUFFIX = ".json"
PARTIAL_SUFFIX = ".tmp"

_log = logging.getLogger(__name__)


class RejectedNote(msgspec.Struct, frozen=True, kw_only=True):
    """What stands beside a rejected update."""

    run: str
    round: int
    device: str
    task: str
    variant: str
    reason: str
    at: float
    """Unix seconds."""
    sha256: str
    size_bytes: int
    codec: Codec
    training_samples: int
    """What the device says."""

    @classmethod
    def of(cls, record: UpdateRecord, *, run: str, variant: str) -> RejectedNote:
        manifest = record.manifest
        return cls(
            run=run,
            round=record.round,
            device=record.device,
            task=record.task,
            variant=variant,
            reason=record.reason,
            at=record.at,
            sha256=manifest.blob.sha256,
            size_bytes=manifest.blob.size_bytes,
            codec=manifest.codec,
            training_samples=manifest.training_samples,
        )

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        return note_name(self.run, self.round, self.device, self.sha256)


def note_name(run: str, round_number: int, device: str, sha256: str) -> str:
    """Runs, devices and hashes have no character that means something in a path."""
    return f"{run}-r{round_number}-{device}-{sha256[:HASH_DIGITS]}"


class RejectedUpdates:
    """The folder they are kept in, which is created when the first one comes."""

    def __init__(self, directory: Path, settings: RejectionSettings) -> None:
        self.directory = directory
        self._settings = settings

    def keep(self, note: RejectedNote, blobs: BlobStore) -> str:
        """Keep an update, if its blob is here, and its note; returns the note's path, empty if nothing was kept.

        Keeping it again changes nothing. Linked, not moved: another device may have sent the very same bytes.
        """
        path = self.directory / (note.name + NOTE_SUFFIX)
        if path.exists():
            return str(path)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if blobs.has(note.sha256) and note.size_bytes <= self._settings.keep_bytes:
                _link(blobs.path(note.sha256), path.with_suffix(UPDATE_SUFFIX))
            _write(path, msgspec.json.format(msgspec.json.encode(note), indent=2))
            self._prune()
        except OSError as exc:
            _log.warning("%s: the rejected update cannot be kept: %s", path, exc.strerror or exc)
        return self.note_path(note.name)

    def note_path(self, name: str) -> str:
        """Where the note of that name is; empty if it was not kept, or had to go for newer ones."""
        path = self.directory / (name + NOTE_SUFFIX)
        return str(path) if path.exists() else ""

    def _prune(self) -> None:
        """The newest within the limits stay; what a kill left half-written goes."""
        for path in self.directory.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink()
        notes = sorted(self.directory.glob(f"*{NOTE_SUFFIX}"), key=lambda path: (-path.stat().st_mtime_ns, path.name))
        used = 0
        for number, note in enumerate(notes, start=1):
            files = [path for path in (note.with_suffix(UPDATE_SUFFIX), note) if path.exists()]
            used += sum(path.stat().st_size for path in files)
            if number > self._settings.keep_updates or used > self._settings.keep_bytes:
                for path in files:  # the note last: without it nobody would find the update
                    path.unlink()


def _link(source: Path, target: Path) -> None:
    """Another name for a file; a copy where the file system has no links."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_suffix(PARTIAL_SUFFIX)
        shutil.copyfile(source, partial)
        partial.replace(target)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(PARTIAL_SUFFIX)
    partial.write_bytes(data)
    partial.replace(path)
