"""What travels beside the payloads: frames of one fixed size, so that a stranger can never make us allocate.

Little-endian throughout. A connection begins with `Hello` from the source and `Verdict` from the target; then each
round is one `Group` or more, each followed by the payloads of its chunks, the last one answered by an `Answer`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mell_gpu_worker.transport.base import SECRET_BYTES, ProtocolError

FRAME_BYTES = 512
MAX_GROUP = 15
"""Most chunks in one group."""
VERSION = 2
_MAGIC = b"MELLKV"

_HELLO = struct.Struct(f"<6sH{SECRET_BYTES}sQQ456x")
_VERDICT = struct.Struct("<6sHBxHQ492x")
_GROUP = struct.Struct("<BBBxI24x")
_CHUNK = struct.Struct("<IIQIBxxxQ")
_ANSWER = struct.Struct("<BB510x")
assert all(each.size == FRAME_BYTES for each in (_HELLO, _VERDICT, _ANSWER))
assert _GROUP.size + MAX_GROUP * _CHUNK.size == FRAME_BYTES

ACCEPTED = 0
REFUSALS = {
    1: "the target knows no offer with this secret",
    2: "the size announced is not the size offered",
    3: "the size announced is over the target's limit",
    4: "the offer is taken already",
    5: "the target speaks another version of the transport protocol",
}
UNKNOWN_SECRET, OTHER_SIZE, OVER_LIMIT, TAKEN, OTHER_VERSION = REFUSALS

GROUP, ANSWER = 1, 2

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
    checksum: int | None

    def encode(self) -> bytes:
        """Return its entry in a group's frame."""
        checked = self.checksum is not None
        return _CHUNK.pack(self.slot, self.count, self.offset, self.length, checked, self.checksum or 0)

    @classmethod
    def decode(cls, frame: bytes, start: int) -> "Chunk":
        """Read the entry that begins at `start`."""
        slot, count, offset, length, checked, checksum = _CHUNK.unpack_from(frame, start)
        return cls(slot, count, offset, length, checksum if checked else None)


@dataclass(frozen=True, slots=True)
class Group:
    """The next chunks of a round, whose payloads follow in this order; the `last` group ends the round."""

    number: int
    """Of the first chunk; counts the chunks of a transfer from 0."""
    chunks: Sequence[Chunk]
    last: bool

    def encode(self) -> bytes:
        """Return the frame."""
        head = _GROUP.pack(GROUP, self.last, len(self.chunks), self.number)
        return b"".join((head, *(chunk.encode() for chunk in self.chunks))).ljust(FRAME_BYTES, b"\0")

    @classmethod
    def decode(cls, frame: bytes) -> "Group":
        """Read a frame; raises `ProtocolError` unless it is a group, of no chunks only at a round's end."""
        kind, last, count, number = _GROUP.unpack_from(frame)
        if kind != GROUP or count > MAX_GROUP or not (count or last):
            raise ProtocolError(f"a frame of kind {kind} with {count} chunks makes no sense")
        starts = range(_GROUP.size, _GROUP.size + count * _CHUNK.size, _CHUNK.size)
        return cls(number, [Chunk.decode(frame, start) for start in starts], bool(last))


@dataclass(frozen=True, slots=True)
class Answer:
    """The target's word on a round: `DONE` after all of it is in place, or a failure at once."""

    code: int

    def encode(self) -> bytes:
        """Return the frame."""
        return _ANSWER.pack(ANSWER, self.code)

    @classmethod
    def decode(cls, frame: bytes) -> "Answer":
        """Read a frame; raises `ProtocolError` if it is no answer."""
        kind, code = _ANSWER.unpack(frame)
        if kind != ANSWER or (code != DONE and code not in FAILURES):
            raise ProtocolError("the target answered something else")
        return cls(code)
