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
    assert [block for block, _ in shelf.find(digests(ids))] == [7]


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
    assert [block for block, _ in shelf.find([digest])] == [2]
    shelf.change(Changes([], [2]))
    assert (shelf.find([digest]), len(shelf)) == ([], 0)


def test_what_is_overwritten_while_it_is_read_is_seen() -> None:
    """From the first such block on nothing counts, even if it holds the same again: what was read may be in between."""
    shelf, wanted = Shelf(), digests(range(12))
    shelf.change(Changes(list(zip(wanted, [5, 6, 7], strict=True)), []))
    found = shelf.find(wanted)
    assert [block for block, _ in found] == [5, 6, 7]
    assert shelf.still(found) == 3
    shelf.change(Changes([], [6]))
    assert shelf.still(found) == 1
    shelf.change(Changes([(wanted[1], 6)], []))
    assert shelf.still(found) == 1
    assert shelf.still(shelf.find(wanted)) == 3


def test_a_preempted_request_has_no_blocks() -> None:
    """Those that it had are others', when it waits for what is fetched for it and ends before that is there."""
    book, shelf, ids = Book(ROOT, SIZE), Shelf(), list(range(8))
    book.know("a", ids)
    book.begin("a", [7, 8], 0)
    shelf.change(book.take())
    book.load("a", [1, 2])
    book.end("a", 8)
    shelf.change(book.take())
    assert shelf.find(digests(ids)) == []


def test_after_a_reset_nothing_of_before_is_there() -> None:
    """Nor what those compute who ran then."""
    book, shelf, ids = Book(ROOT, SIZE), Shelf(), list(range(8))
    book.know("a", ids)
    book.begin("a", [7, 8], 0)
    shelf.change(book.take())
    book.go_on("a", [], 4)
    shelf.change(book.take())
    assert len(shelf) == 1
    book.reset()
    book.go_on("a", [], 8)
    shelf.change(book.take())
    assert len(shelf) == 0


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
        self.preempted: dict[str, dict[str, Any]] = {}
        self.begun = self.weights = 0
        self.cached: dict[tuple[int, ...], int] = {}

    def _allocate(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        blocks, self.free = self.free[:count], self.free[count:]
        for ids in [ids for ids, block in self.cached.items() if block in blocks]:
            del self.cached[ids]
        return blocks

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14), known=st.booleans(), hit=st.booleans())
    def begin(self, prompt: list[int], known: bool, hit: bool) -> None:
        """A request starts, behind what the cache has."""
        self.begun += 1
        self._start(f"r{self.begun}", {"ids": prompt, "known": known}, hit=hit)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=5, max_size=14), aborted=st.booleans())
    def fetch(self, prompt: list[int], aborted: bool) -> None:
        """A request starts behind what is fetched for it, or ends before that has come."""
        self.begun += 1
        self._load(f"r{self.begun}", {"ids": prompt, "known": True}, aborted=aborted)

    def _start(self, name: str, request: dict[str, Any], *, hit: bool) -> bool:
        prompt, shared = request["ids"], list[int]()
        for end in range(SIZE, len(prompt), SIZE) if hit else []:
            block = self.cached.get(tuple(prompt[:end]))
            if block is None or any(block in other["blocks"] for other in self.running.values()):
                break
            shared.append(block)
        self.free = [block for block in self.free if block not in shared]
        fresh = self._allocate(-(-len(prompt) // SIZE) - len(shared))
        if fresh is None:
            self.free += shared
            return False
        self._run(name, request, shared + fresh, len(shared) * SIZE)
        return True

    def _load(self, name: str, request: dict[str, Any], *, aborted: bool) -> bool:
        prompt = request["ids"]
        fetched = (len(prompt) - 1) // SIZE
        blocks = self._allocate(-(-len(prompt) // SIZE))
        if blocks is None:
            return False
        if request["known"]:
            self.book.know(name, prompt)
        self.book.load(name, blocks[:fetched])
        self._step([])
        for place, block in enumerate(blocks[:fetched]):
            self._write(block, prompt[place * SIZE : (place + 1) * SIZE])
        if aborted:
            self.book.end(name, fetched * SIZE)
            self.free += blocks
        else:
            self._run(name, request, blocks, fetched * SIZE)
        return True

    def _run(self, name: str, request: dict[str, Any], blocks: list[int], computed: int) -> None:
        self.running[name] = request
        request |= {"blocks": blocks, "computed": computed}
        if request["known"]:
            self.book.know(name, request["ids"])
        self.book.begin(name, blocks, computed)
        self._step([(request, len(request["ids"]))])

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

    @rule(data=st.data(), preempted=st.booleans())
    def leave(self, data: st.DataObject, preempted: bool) -> None:
        """A request ends, or is preempted; what its blocks hold stays until somebody gets them."""
        if self.running:
            name = data.draw(st.sampled_from(sorted(self.running)))
            self._leave(name, preempted=preempted)

    def _leave(self, name: str, *, preempted: bool) -> None:
        request = self.running.pop(name)
        for place in range(min(request["computed"], len(request["ids"])) // SIZE):
            self.cached[tuple(request["ids"][: (place + 1) * SIZE])] = request["blocks"][place]
        self.free += request["blocks"]
        if preempted:
            self.preempted[name] = request
        else:
            self.book.end(name, request["computed"])

    @rule(data=st.data(), way=st.sampled_from(["computed", "fetched", "fetched, aborted", "ended"]))
    def come_back(self, data: st.DataObject, way: str) -> None:
        """A preempted request goes on, or ends while it waits."""
        if not self.preempted:
            return
        name = data.draw(st.sampled_from(sorted(self.preempted)))
        request = self.preempted[name]
        if way == "ended":
            self.book.end(name, 0)
            over = True
        elif way == "computed":
            over = self._start(name, request, hit=data.draw(st.booleans()))
        else:
            over = self._load(name, request, aborted=way != "fetched")
        if over:
            del self.preempted[name]

    @rule()
    def change_weights(self) -> None:
        """All that run are preempted, the cache is emptied: KV is not what it was."""
        for name in sorted(self.running):
            self._leave(name, preempted=True)
        self.cached.clear()
        self.weights += 1
        self.book.reset()

    def _step(self, work: list[tuple[dict[str, Any], int]]) -> None:
        """The half at the memory hears of the step, then the step writes."""
        self.shelf.change(self.book.take())
        self.check()
        for request, until in work:
            for at in range(request["computed"], until):
                block = request["blocks"][at // SIZE]
                kept = self.memory[block][: at % SIZE] if at % SIZE else []
                self.memory[block] = [*kept, self._kv(request["ids"][at] if at < len(request["ids"]) else None)]
            request["computed"] = until

    def _kv(self, token: int | None) -> tuple[int, int | None]:
        return self.weights, token

    def _write(self, block: int, ids: list[int]) -> None:
        self.memory[block] = [self._kv(token) for token in ids]

    @invariant()
    def check(self) -> None:
        """Whatever the shelf says that a block holds, it holds, once it has heard of everything."""
        if self.book.reset_pending:
            return
        for ids in self._texts():
            for place, (block, _) in enumerate(self.shelf.find(digests_of(ids))):
                assert self.memory[block] == [self._kv(token) for token in ids[place * SIZE : (place + 1) * SIZE]]

    def _texts(self) -> list[tuple[int, ...]]:
        every = [*self.running.values(), *self.preempted.values()]
        return [tuple(request["ids"]) for request in every] + list(self.cached)


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


BUGS = ["forgets what is overwritten", "fills too early", "fills after overwriting", "ignores a reset"]


@pytest.mark.parametrize("bug", BUGS)
def test_the_machine_would_notice(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways in which such a book can be wrong."""
    change = Shelf.change
    if bug == "forgets what is overwritten":
        monkeypatch.setattr(Shelf, "_drop", lambda self, block: None)
    elif bug == "fills too early":
        monkeypatch.setattr(Book, "go_on", _too_early)
    elif bug == "ignores a reset":
        monkeypatch.setattr(Shelf, "change", lambda self, changes: change(self, changes._replace(reset=False)))
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
