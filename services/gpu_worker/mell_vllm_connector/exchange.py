"""KV blocks from one server to another, by digest, over ZeroMQ on TCP: who has them, and their bytes.

A question is [magic, header, digests], the answer [header, bytes]. Whoever asks names digests in the order of their
tokens and gets the first of them, up to one that is not there. Questions that make no sense get no answer.
"""

import logging
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import zmq

from mell_vllm_connector.content import DIGEST_BYTES, Changes, Shelf
from mell_vllm_connector.kv_memory import Bytes, KvMemory

log = logging.getLogger("vllm.mell")

_MAGIC = b"mell-kv/1"
_ASK = struct.Struct("!cI")
"""What is asked, and the question's number."""
_HELD, _TAKE = b"h", b"t"
_ANSWER = struct.Struct("!III")
"""The question's number, blocks, checksum of the bytes."""
_ROUND_BYTES = 8 << 20
"""About so much is asked for at once; the next round is asked for before this one has come."""
_MOST_DIGESTS = 1 << 16
_PATIENCE_S = 2.0
"""For each answer."""
_ABSENT_S = 10.0
_SLOWEST_S = 60.0
"""For all of a request's blocks."""
_LOOK_MS = 100


class ExchangeError(Exception):
    """The other server does not answer, or not sensibly; the message says what was seen."""


class Giver:
    """Answers other servers, on a thread of its own, with what the shelf says the memory holds."""

    def __init__(self, address: str, memory: KvMemory) -> None:
        """Listen at `tcp://host:port`, of this machine. Raises `OSError` if that cannot be had."""
        self._memory = memory
        self._shelf = Shelf()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MOST_DIGESTS * DIGEST_BYTES)
        # Whoever does not read its answers loses them, instead of filling this server's memory.
        self._socket.setsockopt(zmq.SNDHWM, 4)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise OSError(
                f'KV cannot be given at {address} ({error}): set "address", or "bind" to one that is here'
            ) from error
        self._thread = threading.Thread(target=self._run, name="mell-kv-giver", daemon=True)
        self._thread.start()

    def change(self, changes: Changes) -> None:
        """Take in what a step is about to change, before it does."""
        if any(changes):
            with self._lock:
                self._shelf.change(changes)

    def close(self) -> None:
        """Answer nobody any more; safe to repeat."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._socket.poll(_LOOK_MS):
                peer, *frames = self._socket.recv_multipart()
                question = _read_question(frames)
                if question is not None:
                    # A peer that is gone, or does not read.
                    with suppress(zmq.ZMQError):
                        answer = self._answer(question)
                        self._socket.send_multipart([peer, *answer], flags=zmq.NOBLOCK, copy=False)
        self._socket.close()

    def _answer(self, question: "_Question") -> list[bytes | memoryview]:
        what, number, digests = question
        if what == _TAKE:
            digests = digests[: _round_blocks(self._memory.block_bytes)]
        with self._lock:
            found = self._shelf.find(digests)
        if what == _HELD or not found:
            return [_ANSWER.pack(number, len(found), 0), b""]
        try:
            content = self._memory.read([block for block, _ in found])
        except Exception:
            # Without memory to read into, say. Others compute what they do not get.
            log.exception("KV could not be read")
            return [_ANSWER.pack(number, 0, 0), b""]
        with self._lock:
            whole = content[: self._shelf.still(found)]
        return [_ANSWER.pack(number, len(whole), zlib.crc32(whole.data)), whole.data]


class _Question(NamedTuple):
    what: bytes
    number: int
    digests: list[bytes]


def _read_question(frames: Sequence[bytes]) -> _Question | None:
    if len(frames) != 3 or frames[0] != _MAGIC or len(frames[1]) != _ASK.size or len(frames[2]) % DIGEST_BYTES:
        return None
    what, number = _ASK.unpack(frames[1])
    if what not in (_HELD, _TAKE):
        return None
    joined = frames[2]
    digests = [joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]
    return _Question(what, number, digests)


def _round_blocks(block_bytes: int) -> int:
    return max(1, _ROUND_BYTES // block_bytes)


class _Answer(NamedTuple):
    number: int
    blocks: int
    checksum: int
    content: memoryview


class _Asker:
    """One connection to a giver; used by one thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, round(_PATIENCE_S * 1000))
        self._socket.setsockopt(zmq.SNDTIMEO, round(_PATIENCE_S * 1000))
        self._number = 0

    def __enter__(self) -> "_Asker":
        try:
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ExchangeError(f"{self._address} is no address: {error}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def ask(self, what: bytes, digests: Sequence[bytes]) -> int:
        """Send a question; returns its number."""
        self._number += 1
        try:
            self._socket.send_multipart([_MAGIC, _ASK.pack(what, self._number), b"".join(digests)])
        except zmq.ZMQError as error:
            raise ExchangeError(f"{self._address} cannot be asked: {error}") from error
        return self._number

    def answer(self, number: int) -> _Answer:
        """Wait for the answer to a question; answers come in the order of their questions."""
        try:
            frames = self._socket.recv_multipart(copy=False)
        except zmq.ZMQError as error:
            raise ExchangeError(f"{self._address} gave no answer within {_PATIENCE_S:g} s") from error
        if len(frames) != 2 or len(frames[0].buffer) != _ANSWER.size:
            raise ExchangeError(f"{self._address} answered something else")
        answer_to, blocks, checksum = _ANSWER.unpack(frames[0].buffer)
        answer = _Answer(answer_to, blocks, checksum, frames[1].buffer)
        if answer.number != number:
            raise ExchangeError(f"{self._address} answered another question")
        return answer


def count_held(address: str, digests: Sequence[bytes]) -> int:
    """Return how many of the first of these blocks the server at `address` has. Raises `ExchangeError`."""
    with _Asker(address) as asker:
        held = asker.answer(asker.ask(_HELD, digests[:_MOST_DIGESTS])).blocks
    return min(held, len(digests))


class Absent:
    """Servers that gave no answer lately: for a while they are not asked, so that nobody waits for them again."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def count_held(self, address: str, digests: Sequence[bytes]) -> int:
        """As the function of this name; raises `ExchangeError` at once for a server that is thought to be absent."""
        now_s = time.monotonic()
        if self._until_s.get(address, 0.0) > now_s:
            raise ExchangeError(f"{address} gave no answer a moment ago")
        try:
            return count_held(address, digests)
        except ExchangeError:
            self._until_s = {known: until_s for known, until_s in self._until_s.items() if until_s > now_s}
            self._until_s[address] = time.monotonic() + _ABSENT_S
            raise


def take(address: str, digests: Sequence[bytes], block_bytes: int) -> Iterator[Bytes]:
    """Yield the content of these blocks, some rows at a time, up to one that is not there. Raises `ExchangeError`."""
    size = _round_blocks(block_bytes)
    rounds = [digests[at : at + size] for at in range(0, len(digests), size)]
    end_s = time.monotonic() + _SLOWEST_S
    with _Asker(address) as asker:
        asked = [asker.ask(_TAKE, rounds[0])]
        for at, wanted in enumerate(rounds):
            if time.monotonic() > end_s:
                raise ExchangeError(f"{address} is too slow: not all blocks came within {_SLOWEST_S:g} s")
            if at + 1 < len(rounds):
                asked.append(asker.ask(_TAKE, rounds[at + 1]))
            answer = asker.answer(asked[at])
            if len(answer.content) != answer.blocks * block_bytes or answer.blocks > len(wanted):
                raise ExchangeError(f"{address} has blocks of another size")
            if answer.checksum != (zlib.crc32(answer.content) if answer.blocks else 0):
                raise ExchangeError(f"what {address} gave was damaged on the way")
            yield np.frombuffer(answer.content, dtype=np.uint8).reshape(answer.blocks, block_bytes)
            if answer.blocks < len(wanted):
                return
