"""KV blocks by what they hold: chained digests of token ids, and which block of a server holds which. Pure."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

DIGEST_BYTES = 16


def root_digest(layout: str) -> bytes:
    """Return what the digests of first blocks are chained to: KV of another layout has other digests throughout."""
    return hashlib.blake2b(layout.encode(), digest_size=DIGEST_BYTES).digest()


def extend_digests(digests: list[bytes], root: bytes, ids: Sequence[int], blocks: int, block_tokens: int) -> None:
    """Add to `digests` what it lacks of the first `blocks` blocks of `ids`; each is over all tokens up to its end."""
    for place in range(len(digests), blocks):
        tokens = array("q", ids[place * block_tokens : (place + 1) * block_tokens])
        assert len(tokens) == block_tokens, "only full blocks have a digest"
        parent = digests[-1] if digests else root
        digests.append(hashlib.blake2b(tokens.tobytes(), key=parent, digest_size=DIGEST_BYTES).digest())


class Changes(NamedTuple):
    """What is to be known before a step runs: what blocks hold by now, then whose content is about to go."""

    filled: list[tuple[bytes, int]]
    """(digest, block)"""
    overwritten: list[int]
    """Perhaps of those filled: the blocks of who has ended are the next one's."""
    reset: bool = False
    """Before both: nothing counts that was known until now."""


@dataclass(slots=True)
class _Request:
    ids: Sequence[int]
    """The server's own list, which grows."""
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    told: int = 0
    """How many of `blocks` are known to be full."""


class Book:
    """The blocks of a server's requests, followed from step to step by what its scheduler says of each step.

    A block counts as full when a step begins that comes after the one that filled it: whoever runs steps in order has
    then written it.
    """

    def __init__(self, root: bytes, block_tokens: int) -> None:
        self._root = root
        self._block_tokens = block_tokens
        self._requests: dict[str, _Request] = {}
        self._changes = Changes([], [])

    def reset(self) -> None:
        """What was computed up to now must not be given any more; whoever runs is not followed any further."""
        self._requests.clear()
        self._changes = Changes([], self._changes.overwritten, reset=True)

    @property
    def reset_pending(self) -> bool:
        """Whether the other side has not heard of a reset yet."""
        return self._changes.reset

    def know(self, request: str, ids: Sequence[int]) -> None:
        """Follow a request; `ids` is its prompt and output, and grows. One that is not known only overwrites."""
        if request not in self._requests:
            self._requests[request] = _Request(ids)

    def end(self, request: str, computed: int) -> None:
        """The request has ended after `computed` tokens; what its blocks hold stays until somebody overwrites it."""
        known = self._requests.pop(request, None)
        if known is not None:
            self._fill(known, computed)

    def begin(self, request: str, blocks: Sequence[int], computed: int) -> None:
        """A request starts, or starts again, in these blocks, the first `computed` tokens of which are there."""
        self._changes.overwritten.extend(blocks[computed // self._block_tokens :])
        known = self._requests.get(request)
        if known is not None:
            known.blocks, known.told = list(blocks), 0
            self._fill(known, computed)

    def go_on(self, request: str, blocks: Sequence[int], computed: int) -> None:
        """A request goes on after `computed` tokens and gets these blocks besides."""
        self._changes.overwritten.extend(blocks)
        known = self._requests.get(request)
        if known is not None:
            known.blocks.extend(blocks)
            self._fill(known, computed)

    def load(self, request: str, blocks: Sequence[int]) -> None:
        """These blocks are about to be fetched for a request, which has none of those that it may have had before."""
        self._changes.overwritten.extend(blocks)
        known = self._requests.get(request)
        if known is not None:
            known.blocks, known.told = [], 0

    def _fill(self, known: _Request, computed: int) -> None:
        # Servers count tokens that they have not drawn yet: of those nobody knows what the block holds.
        full = min(computed, len(known.ids)) // self._block_tokens
        if full <= known.told:
            return
        extend_digests(known.digests, self._root, known.ids, full, self._block_tokens)
        places = range(known.told, min(full, len(known.blocks)))
        self._changes.filled.extend((known.digests[place], known.blocks[place]) for place in places)
        known.told = full

    def take(self) -> Changes:
        """Return what has changed since the last time."""
        changes, self._changes = self._changes, Changes([], [])
        return changes


class Found(NamedTuple):
    """A block that holds what was asked for, and which of its contents that is."""

    block: int
    stamp: int


class Shelf:
    """Which block holds what, on the side that has the memory. Not safe for threads: its owner locks."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, dict[int, None]] = {}
        """Equal content may lie in several blocks."""
        self._digests: dict[int, bytes] = {}
        self._stamps: dict[int, int] = {}
        self._count = 0
        """Of blocks that were filled; a block's stamp is its number."""

    def __len__(self) -> int:
        """Return the number of blocks whose content is known."""
        return len(self._digests)

    def change(self, changes: Changes) -> None:
        """Take in what a step changes."""
        if changes.reset:
            for block in list(self._digests):
                self._drop(block)
        for digest, block in changes.filled:
            if self._digests.get(block) != digest:
                self._drop(block)
                self._count += 1
                self._digests[block], self._stamps[block] = digest, self._count
                self._blocks.setdefault(digest, {})[block] = None
        for block in changes.overwritten:
            self._drop(block)

    def _drop(self, block: int) -> None:
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._stamps[block]
            holders = self._blocks[digest]
            del holders[block]
            if not holders:
                del self._blocks[digest]

    def find(self, digests: Sequence[bytes]) -> list[Found]:
        """Return the blocks that hold the first of these, up to the first that none holds."""
        found: list[Found] = []
        for digest in digests:
            holders = self._blocks.get(digest)
            if not holders:
                break
            block = next(iter(holders))
            found.append(Found(block, self._stamps[block]))
        return found

    def still(self, found: Sequence[Found]) -> int:
        """Return how many of the first of these have not been touched since `find` found them, not even refilled."""
        touched = (place for place, (block, stamp) in enumerate(found) if self._stamps.get(block) != stamp)
        return next(touched, len(found))
