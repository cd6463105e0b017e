"""Blobs on disk, by content: `<root>/<sha256>`, and `<sha256>.part` while one arrives.

Files appear under their name only whole, checked and synced, so that a kill or a power cut at any moment leaves either
the blob or something to resume. Nothing here holds a whole blob in memory, but `put` and `read` whose callers do.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import BundleError, LocalProtocolError, ResourceError
from reft_edge.wire.blocks import BLOCK_BYTES, TRANSFER_DIGITS, Outline, block_hash

MAX_BLOB_BYTES = 2 * 2**30
"""2 GiB: an order of magnitude beyond what a small device can train."""

RESERVED_FREE_BYTES = 16 * 2**20
"""16 MiB of the disk are left to others, so that a federation never fills up a device."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_CACHED_OUTLINES = 32
"""Each is 16 KB for 128 MB of blob; without the cache every question about a blob would read it all."""

_READ_BYTES = 1 << 20


class BlobStore:
    """Blobs in one directory, which is created. Several processes may share it: every name is written atomically."""

    def __init__(self, root: Path, *, max_blob_bytes: int = MAX_BLOB_BYTES) -> None:
        self.root = root
        self._max_blob_bytes = max_blob_bytes
        self._outlines: dict[str, Outline] = {}
        with _storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> BlobRef:
        """Store `data`; returns its name. Raises `ResourceError` when it does not fit."""
        ref = BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        self.check_size(ref)
        if self.has(ref.sha256):
            return ref
        with _storage_errors(self.root):
            descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.root)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self.path(ref.sha256))
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            sync_directory(self.root)
        return ref

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        if not _SHA256.fullmatch(sha256):
            raise LocalProtocolError(f"{sha256!r} is not a SHA-256 in lower-case hexadecimal digits")
        return self.root / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def read(self, ref: BlobRef) -> bytes:
        """The blob's bytes, checked. Raises `BundleError` when it is missing or damaged; a damaged one is removed."""
        path = self.path(ref.sha256)
        try:
            with path.open("rb") as file:
                data = file.read(ref.size_bytes + 1)
        except OSError as exc:
            raise BundleError(f"blob {ref.sha256[:12]}… cannot be read: {exc.strerror or exc}") from exc
        if len(data) != ref.size_bytes or hashlib.sha256(data).hexdigest() != ref.sha256:
            self.remove(ref.sha256)
            raise BundleError(f"blob {ref.sha256[:12]}… is damaged on disk and was removed")
        return data

    def remove(self, sha256: str) -> None:
        """Remove a blob and what was received of it; neither need exist."""
        self._outlines.pop(sha256, None)
        with _storage_errors(self.root):
            self.path(sha256).unlink(missing_ok=True)
            self._part_path(sha256).unlink(missing_ok=True)

    def sweep(self, keep: set[str]) -> int:
        """Remove all but `keep`, unfinished ones and leftovers of killed processes too; returns the bytes freed."""
        freed = 0
        with _storage_errors(self.root):
            for path in self.root.iterdir():
                name = path.name.removesuffix(".part")
                ours = _SHA256.fullmatch(name) or (name.startswith(".") and name.endswith(".tmp"))
                if ours and name not in keep:
                    freed += path.stat().st_size
                    path.unlink(missing_ok=True)
                    self._outlines.pop(name, None)
        return freed

    def used_bytes(self) -> int:
        """Bytes of everything in the directory."""
        with _storage_errors(self.root):
            return sum(path.stat().st_size for path in self.root.iterdir() if path.is_file())

    def find(self, transfer: str) -> str | None:
        """The SHA-256 of the blob whose transfer has this name."""
        if len(transfer) != TRANSFER_DIGITS or not set(transfer) <= set("0123456789abcdef"):
            return None
        return next((path.name for path in self.root.glob(f"{transfer}*") if _SHA256.fullmatch(path.name)), None)

    def outline(self, sha256: str) -> Outline:
        """How a blob that is here is cut. Raises `BundleError` when it is not here."""
        known = self._outlines.get(sha256)
        if known is None:
            known = self._read_outline(sha256)
            if len(self._outlines) >= _MAX_CACHED_OUTLINES:
                self._outlines.pop(next(iter(self._outlines)))
            self._outlines[sha256] = known
        return known

    def read_block(self, sha256: str, index: int) -> bytes | None:
        """Block `index` of a blob; None when the blob is not here or has no such block."""
        try:
            with self.path(sha256).open("rb") as file:
                file.seek(index * BLOCK_BYTES)
                return file.read(BLOCK_BYTES) or None
        except (OSError, OverflowError, ValueError):  # the latter two: beyond any file
            return None

    def check_size(self, ref: BlobRef) -> None:
        """Raise `ResourceError` for a blob larger than this store takes."""
        if ref.size_bytes > self._max_blob_bytes:
            raise ResourceError(f"a blob of {ref.size_bytes} bytes; this store takes at most {self._max_blob_bytes}")

    def open_part(self, ref: BlobRef, outline: Outline) -> PartFile:
        """Begin or resume receiving `ref`. Raises `ResourceError` when it is too large or the disk too full."""
        self.check_size(ref)
        with _storage_errors(self.root):
            path = self._part_path(ref.sha256)
            missing = ref.size_bytes - (path.stat().st_blocks * 512 if path.exists() else 0)  # it is sparse
            if missing > shutil.disk_usage(self.root).free - RESERVED_FREE_BYTES:
                raise ResourceError(f"{self.root}: no room for a blob of {ref.size_bytes} bytes; free some disk space")
            return PartFile(path, self.path(ref.sha256), ref, outline)

    def _part_path(self, sha256: str) -> Path:
        return self.path(sha256).with_suffix(".part")

    def _read_outline(self, sha256: str) -> Outline:
        hashes = bytearray()
        size = 0
        try:
            with self.path(sha256).open("rb") as file:
                while content := file.read(BLOCK_BYTES):
                    hashes += block_hash(content)
                    size += len(content)
        except OSError as exc:
            raise BundleError(f"blob {sha256[:12]}… cannot be read: {exc.strerror or exc}") from exc
        return Outline(size_bytes=size, hashes=bytes(hashes))


class PartFile:
    """A blob that is being received. Opening it hashes what an earlier process left, so nothing is fetched twice."""

    def __init__(self, path: Path, final_path: Path, ref: BlobRef, outline: Outline) -> None:
        self._path = path
        self._final_path = final_path
        self._ref = ref
        self.outline = outline
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._have = bytearray(outline.n_blocks)
        self.n_missing = outline.n_blocks
        try:
            os.ftruncate(self._descriptor, min(os.fstat(self._descriptor).st_size, ref.size_bytes))
            self._find_blocks()
        except OSError:
            self.close()
            raise

    def _find_blocks(self) -> None:
        for index in range(self.outline.n_blocks):
            content = os.pread(self._descriptor, self.outline.block_bytes, index * self.outline.block_bytes)
            if not content:
                return
            if self.outline.matches(index, content):
                self._have[index] = 1
                self.n_missing -= 1

    def has(self, index: int) -> bool:
        return bool(self._have[index])

    def missing(self, count: int, *, skip: Container[int] = ()) -> list[int]:
        """The first `count` blocks that are neither here nor in `skip`."""
        found: list[int] = []
        index = self._have.find(0)
        while index >= 0 and len(found) < count:
            if index not in skip:
                found.append(index)
            index = self._have.find(0, index + 1)
        return found

    def write(self, index: int, content: bytes) -> None:
        """Store a block that matches the outline. Raises `ResourceError`."""
        with _storage_errors(self._path):
            written = os.pwrite(self._descriptor, content, index * self.outline.block_bytes)
            if written != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not self._have[index]:
            self._have[index] = 1
            self.n_missing -= 1

    def finish(self) -> bool:
        """Sync, hash the whole and give it its name; False, and nothing is left, when the hash is another."""
        with _storage_errors(self._path):
            digest = hashlib.sha256()
            offset = 0
            while content := os.pread(self._descriptor, _READ_BYTES, offset):
                digest.update(content)
                offset += len(content)
            if offset != self._ref.size_bytes or digest.hexdigest() != self._ref.sha256:
                self.discard()
                return False
            os.fsync(self._descriptor)
            self.close()
            self._path.replace(self._final_path)
            sync_directory(self._final_path.parent)
        return True

    def close(self) -> None:
        """Keep what is here for later. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one clear line."""
    try:
        yield
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "the disk is full; free some space" if full else f"{exc.strerror or exc}; check the disk and its rights"
        )
        raise ResourceError(f"{path}: {advice}") from exc
