"""Blocks: how a blob is cut, and the 20-byte header each block carries.

    0   2  magic
    2   1  version
    3   1  reserved, 0
    4   8  transfer: the first 8 bytes of the blob's SHA-256
    12  4  index, big-endian
    16  4  CRC-32 of the 16 bytes before it and the content

The header is the block's own, so nothing depends on MQTT 5 properties. The CRC finds accidents early; what proves a
block is its BLAKE2b-64 in the offer, and what proves the blob is its SHA-256.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

from reft_edge.errors import RemoteProtocolError

BLOCK_BYTES = 64 * 1024
"""64 KiB, measured: the fastest on the local network too, and a control message waits briefly behind it."""

HASH_BYTES = 8
TRANSFER_DIGITS = 16
MAGIC = b"\xb7R"
"""The first byte cannot begin JSON, so blocks and control messages share a topic."""

VERSION = 1
HEADER_BYTES = 20

_FIXED = struct.Struct(">2sBB8sI")
_CRC = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Block:
    """A parsed block. `transfer` is 16 hexadecimal digits."""

    transfer: str
    index: int
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """How a blob is cut: its size, and the hash of each block, `HASH_BYTES` a block."""

    size_bytes: int
    hashes: bytes
    block_bytes: int = BLOCK_BYTES

    @property
    def n_blocks(self) -> int:
        return count_blocks(self.size_bytes, self.block_bytes)

    def length(self, index: int) -> int:
        """Bytes of block `index`; all but the last are of full size."""
        return min(self.block_bytes, self.size_bytes - index * self.block_bytes)

    def matches(self, index: int, content: bytes) -> bool:
        """Whether `content` is block `index`."""
        expected = self.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        return len(content) == self.length(index) and block_hash(content) == expected


def transfer_name(sha256: str) -> str:
    """The name of a blob's transfer in headers and topics."""
    return sha256[:TRANSFER_DIGITS]


def count_blocks(size_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    return -(-size_bytes // block_bytes)


def block_hash(content: bytes) -> bytes:
    """BLAKE2b with 8 bytes of output (RFC 7693)."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def pack_block(block: Block) -> bytes:
    head = _FIXED.pack(MAGIC, VERSION, 0, bytes.fromhex(block.transfer), block.index)
    return b"".join((head, _CRC.pack(zlib.crc32(block.content, zlib.crc32(head))), block.content))


def is_block(payload: bytes) -> bool:
    """Whether a payload claims to be a block; else it is a control message."""
    return payload[:1] == MAGIC[:1]


def parse_block(payload: bytes) -> Block:
    """Check and split a block. Raises `RemoteProtocolError`."""
    if not HEADER_BYTES < len(payload) <= HEADER_BYTES + BLOCK_BYTES:
        raise RemoteProtocolError(
            f"a block has {HEADER_BYTES + 1} to {HEADER_BYTES + BLOCK_BYTES} bytes: {len(payload)}"
        )
    magic, version, _reserved, transfer, index = _FIXED.unpack_from(payload)
    if magic != MAGIC or version != VERSION:
        raise RemoteProtocolError(f"block has magic {magic!r} and version {version}; expected {MAGIC!r}, {VERSION}")
    content = payload[HEADER_BYTES:]
    (crc,) = _CRC.unpack_from(payload, _FIXED.size)
    if crc != zlib.crc32(content, zlib.crc32(payload[: _FIXED.size])):
        raise RemoteProtocolError(f"block {index} of transfer {transfer.hex()} is damaged: its CRC differs")
    return Block(transfer.hex(), index, content)
