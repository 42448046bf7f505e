"""Which block holds what: by hand, and against a server that allocates, shares, frees and overwrites at random."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mell_vllm_connector.content import DIGEST_BYTES, Book, Changes, Shelf, extend_digests, root_digest

SIZE = 4
ROOT = root_digest("layout")


def digests(ids: Sequence[int], root: bytes = ROOT) -> list[bytes]:
    """Of all full blocks of these ids."""
    made: list[bytes] = []
    extend_digests(made, root, ids, len(ids) // SIZE, SIZE)
    return made


def test_a_digest_is_of_everything_up_to_its_block() -> None:
    """Of the layout, too; what is there already is not made again."""
    one, other = digests(range(12)), digests([0, 1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11])
    assert [len(digest) for digest in one] == [DIGEST_BYTES] * 3
    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])
    assert not set(one) & set(digests(range(12), root_digest("another")))
    kept = one[:2]
    extend_digests(kept, b"not used any more", range(12), 3, SIZE)
    assert kept == one


def test_a_block_is_full_only_once_its_tokens_are_known_and_computed() -> None:
    """A server counts tokens as computed that it has not drawn; and a block is told once."""
    book, ids = Book(ROOT, SIZE), list(range(6))
    book.know("a", ids)
    book.begin("a", [7, 8], 0)
    assert book.take() == Changes([], [7, 8])
    book.go_on("a", [], 6)
    assert book.take().filled == [(digests(ids)[0], 7)]
    book.go_on("a", [], 8)
    assert book.take() == Changes([], [])
    ids += [6, 7]
    book.go_on("a", [9], 8)
    assert book.take() == Changes([(digests(ids)[1], 8)], [9])


def test_who_ends_leaves_what_was_computed_last() -> None:
    """Until the next one gets the block, which may be in the very next step."""
    book, shelf, ids = Book(ROOT, SIZE), Shelf(), list(range(8))
    book.know("a", ids)
    book.begin("a", [7, 8], 0)
    shelf.change(book.take())
    book.end("a", 8)
    book.begin("b", [8], 0)
    shelf.change(book.take())
    assert shelf.find(digests(ids)) == [7]


def test_a_request_that_is_not_known_only_overwrites() -> None:
    """One with an adapter or a picture, say: its blocks hold nothing that anybody could ask for."""
    book = Book(ROOT, SIZE)
    book.begin("a", [1, 2, 3], 4)
    book.go_on("a", [5], 12)
    assert book.take() == Changes([], [2, 3, 5])


def test_equal_blocks_are_there_until_the_last_is_overwritten() -> None:
    """A second request that computes what a first one has makes a block of the same content."""
    shelf, (digest,) = Shelf(), digests(range(4))
    shelf.change(Changes([(digest, 1), (digest, 2)], []))
    shelf.change(Changes([], [1]))
    assert shelf.find([digest]) == [2]
    shelf.change(Changes([], [2]))
    assert (shelf.find([digest]), len(shelf)) == ([], 0)


def test_what_is_overwritten_while_it_is_read_is_seen() -> None:
    """From the first such block on nothing counts."""
    shelf, wanted = Shelf(), digests(range(12))
    shelf.change(Changes(list(zip(wanted, [5, 6, 7], strict=True)), []))
    blocks = shelf.find(wanted)
    assert blocks == [5, 6, 7]
    assert shelf.still(wanted, blocks) == 3
    shelf.change(Changes([], [6]))
    assert shelf.still(wanted, blocks) == 1
    shelf.change(Changes([(wanted[1], 6)], []))
    assert shelf.still(wanted, blocks) == 3


digests_of = functools.lru_cache(maxsize=None)(digests)
BLOCKS = 12


class Server(RuleBasedStateMachine):
    """A server's scheduler and its memory: each block remembers what was written to it, as computing does."""

    @initialize()
    def start(self) -> None:
        """Nothing runs."""
        self.book, self.shelf = Book(ROOT, SIZE), Shelf()
        self.memory: dict[int, list[Any]] = {block: [] for block in range(BLOCKS)}
        self.free = list(range(BLOCKS))
        self.running: dict[str, dict[str, Any]] = {}
        self.begun = 0
        self.cached: dict[tuple[int, ...], int] = {}

    def _allocate(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        blocks, self.free = self.free[:count], self.free[count:]
        for ids in [ids for ids, block in self.cached.items() if block in blocks]:
            del self.cached[ids]
        return blocks

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        known=st.booleans(),
        hit=st.booleans(),
        fetched=st.booleans(),
    )
    def begin(self, prompt: list[int], known: bool, hit: bool, fetched: bool) -> None:
        """A request starts: behind what the cache has, or behind what was fetched for it, if so."""
        ends = range(SIZE, len(prompt), SIZE)
        shared: list[int] = []
        for end in ends if hit else []:
            block = self.cached.get(tuple(prompt[:end]))
            if block is None or any(block in request["blocks"] for request in self.running.values()):
                break
            shared.append(block)
        self.free = [block for block in self.free if block not in shared]
        fresh = self._allocate(-(-len(prompt) // SIZE) - len(shared))
        if fresh is None:
            self.free += shared
            return
        blocks, computed, name = shared + fresh, len(shared) * SIZE, f"r{self.begun}"
        self.begun += 1
        if fetched and len(ends) > len(shared):
            loaded = blocks[len(shared) : len(ends)]
            self.book.overwrite(loaded)
            self._step([])
            for place, block in enumerate(loaded, len(shared)):
                self.memory[block] = prompt[place * SIZE : (place + 1) * SIZE]
            computed = len(ends) * SIZE
        request = {"ids": prompt, "blocks": blocks, "computed": computed, "known": known}
        self.running[name] = request
        if known:
            self.book.know(name, request["ids"])
        self.book.begin(name, blocks, computed)
        self._step([(request, len(prompt))])

    @rule(data=st.data(), drawn=st.booleans())
    def go_on(self, data: st.DataObject, drawn: bool) -> None:
        """A request decodes; the token of the step before may not be known to the scheduler yet."""
        if not self.running:
            return
        name = data.draw(st.sampled_from(sorted(self.running)))
        request = self.running[name]
        ids, computed = request["ids"], request["computed"]
        if drawn or computed >= len(ids):
            ids.append(data.draw(st.integers(0, 1)))
        blocks = [] if computed < len(request["blocks"]) * SIZE else self._allocate(1)
        if blocks is None:
            return
        request["blocks"] += blocks
        self.book.go_on(name, blocks, computed)
        self._step([(request, computed + 1)])

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A request ends, or is preempted; what its blocks hold stays until somebody gets them."""
        if self.running:
            name = data.draw(st.sampled_from(sorted(self.running)))
            request = self.running.pop(name)
            for place in range(min(request["computed"], len(request["ids"])) // SIZE):
                self.cached[tuple(request["ids"][: (place + 1) * SIZE])] = request["blocks"][place]
            self.free += request["blocks"]
            self.book.end(name, request["computed"])

    def _step(self, work: list[tuple[dict[str, Any], int]]) -> None:
        """The half at the memory hears of the step, then the step writes."""
        self.shelf.change(self.book.take())
        self.check()
        for request, until in work:
            for at in range(request["computed"], until):
                block = request["blocks"][at // SIZE]
                kept = self.memory[block][: at % SIZE] if at % SIZE else []
                self.memory[block] = [*kept, request["ids"][at] if at < len(request["ids"]) else "unknown"]
            request["computed"] = until

    @invariant()
    def check(self) -> None:
        """Whatever the shelf says that a block holds, it holds."""
        for ids in self._texts():
            for place, block in enumerate(self.shelf.find(digests_of(ids))):
                assert self.memory[block] == list(ids[place * SIZE : (place + 1) * SIZE])

    def _texts(self) -> list[tuple[int, ...]]:
        return [tuple(request["ids"]) for request in self.running.values()] + list(self.cached)


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("bug", ["forgets what is overwritten", "fills too early", "fills after overwriting"])
def test_the_machine_would_notice(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways in which such a book can be wrong."""
    change = Shelf.change
    if bug == "forgets what is overwritten":
        monkeypatch.setattr(Shelf, "_drop", lambda self, block: None)
    elif bug == "fills too early":
        monkeypatch.setattr(Book, "go_on", _too_early)
    else:
        monkeypatch.setattr(
            Shelf,
            "change",
            lambda self, changes: [
                change(self, Changes([], changes.overwritten)),
                change(self, Changes(changes.filled, [])),
            ],
        )
    with pytest.raises(AssertionError):
        _run_machine()


def _too_early(self: Book, request: str, blocks: Sequence[int], computed: int) -> None:
    self._changes.overwritten.extend(blocks)
    known = self._requests.get(request)
    if known is not None:
        known.blocks.extend(blocks)
        self._fill(known, computed + 1)


def _run_machine() -> None:
    # The first example that fails will do.
    run_state_machine_as_test(
        Server,
        settings=settings(
            max_examples=500, stateful_step_count=30, deadline=None, database=None, phases=[Phase.generate]
        ),
    )
