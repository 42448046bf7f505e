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

    def overwrite(self, blocks: Sequence[int]) -> None:
        """Something else is about to be written to these blocks."""
        self._changes.overwritten.extend(blocks)

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


class Shelf:
    """Which block holds what, on the side that has the memory. Not safe for threads: its owner locks."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, dict[int, None]] = {}
        """Equal content may lie in several blocks."""
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Return the number of blocks whose content is known."""
        return len(self._digests)

    def change(self, changes: Changes) -> None:
        """Take in what a step changes."""
        for digest, block in changes.filled:
            if self._digests.get(block) != digest:
                self._drop(block)
                self._digests[block] = digest
                self._blocks.setdefault(digest, {})[block] = None
        for block in changes.overwritten:
            self._drop(block)

    def _drop(self, block: int) -> None:
        digest = self._digests.pop(block, None)
        if digest is not None:
            holders = self._blocks[digest]
            del holders[block]
            if not holders:
                del self._blocks[digest]

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks that hold the first of these, up to the first that none holds."""
        found: list[int] = []
        for digest in digests:
            holders = self._blocks.get(digest)
            if not holders:
                break
            found.append(next(iter(holders)))
        return found

    def still(self, digests: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Return how many of the first of these blocks hold what `find` found in them."""
        pairs = zip(digests, blocks, strict=False)
        return next((place for place, (d, b) in enumerate(pairs) if self._digests.get(b) != d), len(blocks))
