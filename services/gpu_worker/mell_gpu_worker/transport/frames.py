"""What travels beside the payloads: frames of one fixed size, so that a stranger can never make us allocate.

Little-endian throughout. A connection begins with `Hello` from the source and `Verdict` from the target; then each
round is any number of `Chunk` frames, each followed by its payload, and a `Mark`, answered by an `Answer`.
"""

import struct
from dataclasses import dataclass

from mell_gpu_worker.transport.base import SECRET_BYTES, ProtocolError

FRAME_BYTES = 64
VERSION = 1
_MAGIC = b"MELLKV"

_HELLO = struct.Struct(f"<6sH{SECRET_BYTES}sQQ8x")
_VERDICT = struct.Struct("<6sHBxHQ44x")
_CHUNK = struct.Struct("<BBxxIIIQQQ24x")
_MARK = struct.Struct("<BxxxIQ48x")
_ANSWER = struct.Struct("<BBxxIQ48x")
assert all(each.size == FRAME_BYTES for each in (_HELLO, _VERDICT, _CHUNK, _MARK, _ANSWER))

ACCEPTED = 0
REFUSALS = {
    1: "the target knows no offer with this secret",
    2: "the size announced is not the size offered",
    3: "the size announced is over the target's limit",
    4: "the offer is taken already",
    5: "the target speaks another version of the transport protocol",
}
UNKNOWN_SECRET, OTHER_SIZE, OVER_LIMIT, TAKEN, OTHER_VERSION = REFUSALS

CHUNK, MARK, ANSWER = 1, 2, 3

DONE = 0
FAILURES = {1: "a chunk arrived corrupted", 2: "the target could not make sense of what it received"}
CORRUPTED, SENSELESS = FAILURES


@dataclass(frozen=True, slots=True)
class Hello:
    """The source's first frame; `tag` is where it expects the target's frames (UCX)."""

    secret: bytes
    size_bytes: int
    tag: int = 0
    version: int = VERSION

    def encode(self) -> bytes:
        """Return the frame."""
        return _HELLO.pack(_MAGIC, self.version, self.secret, self.size_bytes, self.tag)

    @classmethod
    def decode(cls, frame: bytes) -> "Hello":
        """Read a frame; raises `ProtocolError` if it is none of ours."""
        magic, version, secret, size_bytes, tag = _HELLO.unpack(frame)
        if magic != _MAGIC:
            raise ProtocolError("the first bytes are not those of a Mell worker")
        return cls(secret, size_bytes, tag, version)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's answer to a `Hello`; `tag` is where it expects an accepted source's messages (UCX)."""

    code: int
    tag: int = 0

    def encode(self) -> bytes:
        """Return the frame."""
        return _VERDICT.pack(_MAGIC, VERSION, 0, self.code, self.tag)

    @classmethod
    def decode(cls, frame: bytes) -> "Verdict":
        """Read a frame; raises `ProtocolError` if it is none of ours."""
        magic, _, _, code, tag = _VERDICT.unpack(frame)
        if magic != _MAGIC or (code != ACCEPTED and code not in REFUSALS):
            raise ProtocolError("the answer is not that of a Mell worker")
        return cls(code, tag)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A payload to come: `count` whole slots from `slot` on, or (count 1) `length` bytes at `offset` of `slot`."""

    slot: int
    count: int
    offset: int
    length: int
    number: int
    """Counts the chunks of a transfer from 0."""
    checksum: int | None

    def encode(self) -> bytes:
        """Return the frame."""
        checked = self.checksum is not None
        return _CHUNK.pack(
            CHUNK, checked, self.slot, self.count, self.number, self.offset, self.length, self.checksum or 0
        )

    @classmethod
    def decode(cls, frame: bytes) -> "Chunk":
        """Read a frame of kind `CHUNK`."""
        _, checked, slot, count, number, offset, length, checksum = _CHUNK.unpack(frame)
        return cls(slot, count, offset, length, number, checksum if checked else None)


@dataclass(frozen=True, slots=True)
class Mark:
    """The end of a round: how many chunks and bytes it had."""

    chunks: int
    size_bytes: int

    def encode(self) -> bytes:
        """Return the frame."""
        return _MARK.pack(MARK, self.chunks, self.size_bytes)

    @classmethod
    def decode(cls, frame: bytes) -> "Mark":
        """Read a frame of kind `MARK`."""
        _, chunks, size_bytes = _MARK.unpack(frame)
        return cls(chunks, size_bytes)


@dataclass(frozen=True, slots=True)
class Answer:
    """The target's word on a round: `DONE` after all of it is in place, or a failure at once."""

    code: int

    def encode(self) -> bytes:
        """Return the frame."""
        return _ANSWER.pack(ANSWER, self.code, 0, 0)

    @classmethod
    def decode(cls, frame: bytes) -> "Answer":
        """Read a frame; raises `ProtocolError` if it is no answer."""
        kind, code, _, _ = _ANSWER.unpack(frame)
        if kind != ANSWER or (code != DONE and code not in FAILURES):
            raise ProtocolError("the target answered something else")
        return cls(code)
