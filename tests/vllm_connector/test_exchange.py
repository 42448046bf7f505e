"""Blocks between two servers over real sockets: what is asked, given, damaged, and never answered."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import zmq

from mell_vllm_connector import exchange
from mell_vllm_connector.content import Changes
from mell_vllm_connector.exchange import Absent, ExchangeError, Giver, count_held, take
from mell_vllm_connector.kv_memory import Bytes
from tests.ports import free_port

BLOCK_BYTES = 1000
DIGESTS = [bytes([number]) * 16 for number in range(20)]


class Memory:
    """Block n is full of n; `meanwhile` happens while it is read."""

    block_bytes = BLOCK_BYTES

    def __init__(self) -> None:
        self.reads: list[list[int]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def note(self) -> None:
        """Nothing is computed."""

    def read(self, blocks: Sequence[int]) -> Bytes:
        """Return the blocks."""
        self.reads.append(list(blocks))
        self.meanwhile()
        return np.repeat(np.array(blocks, dtype=np.uint8)[:, None], BLOCK_BYTES, axis=1)

    def write(self, blocks: Sequence[int], content: Bytes) -> None:
        """Nobody writes here."""
        raise AssertionError("nothing is fetched here")


@pytest.fixture
def address() -> str:
    """Where a server is, or would be."""
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture
def giver(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Giver]:
    """One that has blocks 100 to 119 of these digests; rounds are of four blocks."""
    monkeypatch.setattr(exchange, "_ROUND_BYTES", 4 * BLOCK_BYTES)
    monkeypatch.setattr(exchange, "_PATIENCE_S", 0.5)
    giver = Giver(address, Memory())
    giver.change(Changes([(digest, 100 + number) for number, digest in enumerate(DIGESTS)], []))
    yield giver
    giver.close()
    giver.close()  # is safe to repeat


def taken(address: str, digests: Sequence[bytes]) -> list[int]:
    """The blocks that come, by their content."""
    rows = [row for content in take(address, digests, BLOCK_BYTES) for row in content]
    assert all((row == row[0]).all() for row in rows)
    return [int(row[0]) for row in rows]


def test_all_blocks_come_in_order(giver: Giver, address: str) -> None:
    """In rounds, whatever part of them is asked for."""
    assert count_held(address, DIGESTS) == 20
    assert taken(address, DIGESTS) == list(range(100, 120))
    assert taken(address, DIGESTS[3:9]) == list(range(103, 109))


def test_blocks_come_up_to_the_first_that_is_not_there(giver: Giver, address: str) -> None:
    """Behind a hole nothing is of use."""
    giver.change(Changes([], [106]))
    assert count_held(address, DIGESTS) == 6
    assert taken(address, DIGESTS) == list(range(100, 106))
    assert (count_held(address, DIGESTS[6:]), taken(address, DIGESTS[6:])) == (0, [])


def test_a_block_that_is_overwritten_while_it_is_read_is_not_given(giver: Giver, address: str) -> None:
    """Nor those behind it: its bytes may be of both contents."""
    memory = giver._memory
    assert isinstance(memory, Memory)
    memory.meanwhile = lambda: giver.change(Changes([], [102]))
    assert taken(address, DIGESTS[:4]) == [100, 101]


def test_a_block_that_cannot_be_read_is_not_given(giver: Giver, address: str) -> None:
    """As for want of memory to read it into; the giver goes on."""
    memory = giver._memory
    assert isinstance(memory, Memory)

    def fail() -> None:
        raise MemoryError

    memory.meanwhile = fail
    assert taken(address, DIGESTS[:4]) == []
    memory.meanwhile = lambda: None
    assert taken(address, DIGESTS[:4]) == [100, 101, 102, 103]


def test_who_gave_no_answer_is_not_asked_again_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else waits for it; after a while it may be back."""
    monkeypatch.setattr(exchange, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(exchange, "_ABSENT_S", 1.0)
    absent = Absent()
    with pytest.raises(ExchangeError, match="no answer within"):
        absent.count_held(address, DIGESTS)
    with pytest.raises(ExchangeError, match="a moment ago"):
        absent.count_held(address, DIGESTS)
    giver = Giver(address, Memory())
    try:
        time.sleep(1.0)
        assert absent.count_held(address, DIGESTS) == 0
    finally:
        giver.close()


def test_a_server_that_is_too_slow_is_given_up(giver: Giver, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it answers each question in time."""
    monkeypatch.setattr(exchange, "_SLOWEST_S", 0.1)
    memory = giver._memory
    assert isinstance(memory, Memory)
    memory.meanwhile = lambda: time.sleep(0.06)
    with pytest.raises(ExchangeError, match="too slow"):
        taken(address, DIGESTS)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"x"],
        [b"mell-kv/1", b"h"],
        [b"mell-kv/1", b"h\0\0\0\1", b"short"],
        [b"mell-kv/1", b"x\0\0\0\1", b""],
        [b"mell-kv/1", b"h\0\0\0\1", bytes(2 << 20)],
        [b"", b"", b""],
    ],
    ids=["nothing", "a letter", "too few", "no digest", "another question", "too much", "empty"],
)
def test_nonsense_gets_no_answer_and_hurts_nobody(giver: Giver, address: str, frames: list[bytes]) -> None:
    """The next question is answered."""
    with zmq.Context.instance().socket(zmq.DEALER) as stranger:
        stranger.connect(address)
        stranger.send_multipart(frames or [b""])
        assert count_held(address, DIGESTS) == 20
        assert not stranger.poll(100)


def test_many_ask_at_once(giver: Giver, address: str) -> None:
    """Each gets its own answers."""
    got: list[list[int]] = []
    threads = [threading.Thread(target=lambda: got.append(taken(address, DIGESTS))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [list(range(100, 120))] * 8


def test_an_address_that_is_taken_is_said_to_be(giver: Giver, address: str) -> None:
    """At the server's start."""
    with pytest.raises(OSError, match="cannot be given at"):
        Giver(address, Memory())


def test_nobody_there_is_an_error_soon(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is a word that is no address."""
    monkeypatch.setattr(exchange, "_PATIENCE_S", 0.2)
    begun_s = time.monotonic()
    with pytest.raises(ExchangeError, match="no answer within"):
        count_held(address, DIGESTS)
    with pytest.raises(ExchangeError, match="no answer within"):
        taken(address, DIGESTS)
    assert time.monotonic() - begun_s < 10
    with pytest.raises(ExchangeError, match="no address"):
        count_held("nonsense", DIGESTS)


class Liar:
    """Answers each question as a test says."""

    def __init__(self, address: str, answer: Callable[[int], list[bytes]]) -> None:
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(address)
        self._answer = answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(20):
                peer, _, header, _ = self._socket.recv_multipart()
                self._socket.send_multipart([peer, *self._answer(exchange._ASK.unpack(header)[1])])
        self._socket.close()

    def close(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()


LIES: dict[str, tuple[Callable[[int], list[bytes]], str]] = {
    "another form": (lambda number: [b"yes"], "something else"),
    "another question's": (lambda number: [exchange._ANSWER.pack(number + 1, 0, 0), b""], "another question"),
    "too few bytes": (lambda number: [exchange._ANSWER.pack(number, 2, 0), b"x"], "another size"),
    "too many blocks": (lambda number: [exchange._ANSWER.pack(number, 9, 0), bytes(9 * BLOCK_BYTES)], "another size"),
    "damaged": (lambda number: [exchange._ANSWER.pack(number, 1, 1), bytes(BLOCK_BYTES)], "damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_makes_no_sense_is_not_used(address: str, lie: str) -> None:
    """Its words say what was wrong."""
    answer, words = LIES[lie]
    liar = Liar(address, answer)
    try:
        with pytest.raises(ExchangeError, match=words):
            taken(address, DIGESTS[:4])
    finally:
        liar.close()
