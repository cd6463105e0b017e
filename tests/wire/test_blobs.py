"""The blob store: whole or not at all, whatever happens; and blocks, which are what they claim or refused."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.bundle.manifest import BlobRef
from reft_edge.errors import BundleError, LocalProtocolError, RemoteProtocolError, ResourceError
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import BLOCK_BYTES, HASH_BYTES, Block, pack_block, parse_block, transfer_name

DATA = random.Random(1).randbytes(5 * BLOCK_BYTES + 100)


def receive(store: BlobStore, ref: BlobRef, source: BlobStore, indices: list[int]) -> int:
    """Write some blocks into a part file and leave it as a killed process would; returns what was missing before."""
    part = store.open_part(ref, source.outline(ref.sha256))
    missing = part.n_missing
    for index in indices:
        content = source.read_block(ref.sha256, index)
        assert content is not None
        part.write(index, content)
    part.close()
    return missing


def test_what_is_put_is_read_and_putting_it_twice_is_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "deep" / "store")
    ref = store.put(DATA)
    assert ref == store.put(DATA) == BlobRef(sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))
    assert store.read(ref) == DATA
    assert store.has(ref.sha256)
    assert store.find(transfer_name(ref.sha256)) == ref.sha256
    assert store.used_bytes() == len(DATA)
    outline = store.outline(ref.sha256)
    assert (outline.n_blocks, outline.length(5), len(outline.hashes)) == (6, 100, 6 * HASH_BYTES)
    assert [path.name for path in store.root.iterdir()] == [ref.sha256]


def test_a_part_file_resumes_with_the_blocks_that_are_good(tmp_path: Path) -> None:
    source, store = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    ref = source.put(DATA)
    assert receive(store, ref, source, [4, 0, 2]) == 6
    with (store.root / f"{ref.sha256}.part").open("r+b") as file:
        file.seek(2 * BLOCK_BYTES + 7)
        file.write(b"damage by a power cut")
    part = store.open_part(ref, source.outline(ref.sha256))
    assert part.missing(10) == [1, 2, 3, 5]
    assert part.missing(2, skip={1}) == [2, 3]
    part.close()
    assert receive(store, ref, source, [1, 2, 3, 5]) == 4
    part = store.open_part(ref, source.outline(ref.sha256))
    assert part.n_missing == 0
    assert part.finish()
    assert store.read(ref) == DATA
    assert not store.path(ref.sha256).with_suffix(".part").exists()


def test_a_part_file_with_another_hash_leaves_nothing(tmp_path: Path) -> None:
    source, store = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    held = source.put(DATA)
    wrong = BlobRef(sha256="a" * 64, size_bytes=len(DATA))
    part = store.open_part(wrong, source.outline(held.sha256))
    for index in range(6):
        part.write(index, DATA[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])
    assert not part.finish()
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA + b"x", bytes(len(DATA))])
def test_a_damaged_blob_is_refused_and_removed(tmp_path: Path, damage: bytes) -> None:
    store = BlobStore(tmp_path)
    ref = store.put(DATA)
    store.path(ref.sha256).write_bytes(damage)
    with pytest.raises(BundleError, match="damaged"):
        store.read(ref)
    assert not store.has(ref.sha256)
    with pytest.raises(BundleError, match="cannot be read"):
        store.read(ref)


def test_sweeping_keeps_what_is_named_and_touches_no_strangers(tmp_path: Path) -> None:
    source, store = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    kept, old = store.put(b"kept"), store.put(b"old!")
    arriving, abandoned = source.put(DATA), source.put(DATA[1:])
    receive(store, arriving, source, [0])
    receive(store, abandoned, source, [0])
    (store.root / ".x.tmp").write_bytes(b"left by a killed process")
    (store.root / "notes.txt").write_bytes(b"not ours")
    assert store.sweep({kept.sha256, arriving.sha256}) >= BLOCK_BYTES
    assert {path.name for path in store.root.iterdir()} == {kept.sha256, f"{arriving.sha256}.part", "notes.txt"}
    store.remove(old.sha256)
    store.remove(arriving.sha256)
    assert not store.path(arriving.sha256).with_suffix(".part").exists()


def test_limits_and_full_disks_are_resource_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path / "store", max_blob_bytes=1000)
    with pytest.raises(ResourceError, match="at most 1000"):
        store.put(bytes(1001))
    source = BlobStore(tmp_path / "source")
    ref = source.put(DATA)
    with pytest.raises(ResourceError, match="at most 1000"):
        store.open_part(ref, source.outline(ref.sha256))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    part = source.open_part(ref, source.outline(ref.sha256))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="free some space"):
        part.write(0, DATA[:BLOCK_BYTES])
    part.discard()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="free some space"):
        store.put(b"x")
    assert list(store.root.iterdir()) == []
    with pytest.raises(ResourceError, match="check the disk"):
        BlobStore(Path("/proc/no/store"))


@pytest.mark.parametrize("name", ["", "../etc/passwd", "A" * 64, "a" * 63, "a" * 65])
def test_names_that_are_no_hash_never_reach_the_disk(tmp_path: Path, name: str) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(LocalProtocolError):
        store.path(name)
    assert store.find(name) is None


@given(
    transfer=st.binary(min_size=8, max_size=8),
    index=st.integers(0, 2**32 - 1),
    content=st.binary(min_size=1, max_size=99),
)
def test_blocks_round_trip_and_no_changed_bit_passes(transfer: bytes, index: int, content: bytes) -> None:
    block = Block(transfer.hex(), index, content)
    packed = pack_block(block)
    assert parse_block(packed) == block
    position = index % (len(packed) * 8)
    changed = bytearray(packed)
    changed[position // 8] ^= 1 << (position % 8)
    with pytest.raises(RemoteProtocolError):
        parse_block(bytes(changed))


@pytest.mark.parametrize("payload", [b"", bytes(20), bytes(21), bytes(BLOCK_BYTES + 21)])
def test_what_is_no_block_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_block(payload)
