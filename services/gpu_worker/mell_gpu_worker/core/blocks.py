"""The KV pool's bookkeeping: which blocks are free, who shares which, and what finished blocks hold.

Knows block ids and digests of their content, never the memory itself. Whoever holds a block holds one reference;
a table of blocks handed from one holder to another needs nothing here.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def root_digest(*identity: str) -> bytes:
    """Return the parent digest of first blocks, for all that must be equal before KV may be shared."""
    return blake2b("\0".join(identity).encode(), digest_size=DIGEST_BYTES).digest()


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the digest of a full block holding `token_ids` after the tokens that `parent` stands for."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """Reference-counted blocks 0 to `kv_blocks` - 1 of `block_tokens` tokens each.

    A full block can be *sealed* with the digest of its content; unless `prefix_cache` is off, equal beginnings then
    share it. A sealed block that nobody holds any more counts as free, keeps its content, and is taken last, the
    least recently used first.
    """

    def __init__(self, kv_blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        assert kv_blocks > 0, "a pool holds at least one block"
        assert block_tokens > 0, "a block holds at least one token"
        self.kv_blocks = kv_blocks
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self._references = [0] * kv_blocks
        self._blank = list(range(kv_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._digests: list[bytes | None] = [None] * kv_blocks
        self._sealed: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds, those with cached content included."""
        return len(self._blank) + len(self._idle)

    @property
    def used_blocks(self) -> int:
        """Blocks that somebody holds, shared ones counted once."""
        return self.kv_blocks - self.free_blocks

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def references(self, block: int) -> int:
        """Return how often `block` is held."""
        return self._references[block]

    def cached(self, digests: Iterable[bytes]) -> list[int]:
        """Return the blocks that hold the longest run of `digests` from the first on."""
        blocks = []
        for digest in digests:
            block = self._sealed.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def fits(self, shared: Sequence[int], fresh: int) -> bool:
        """Whether `share(shared)` and then `allocate(fresh)` is possible now."""
        revived = sum(1 for block in shared if not self._references[block])
        return revived + fresh <= self.free_blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each of `blocks`, which `cached` returned just now."""
        for block in blocks:
            if not self._references[block]:
                del self._idle[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks that nobody else holds, content undefined; they must be free."""
        assert count <= self.free_blocks, f"{count} blocks asked for, {self.free_blocks} free"
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._unseal(block)
        self._references[block] = 1
        return block

    def release(self, table: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence's table."""
        # From the end, so that a chain's tail, useless without its head, is also evicted first.
        for block in reversed(table):
            assert self._references[block] > 0, f"block {block} is released more often than held"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._digests[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def seal(self, block: int, digest: bytes) -> None:
        """Say that `block` is full, will not be written again and holds what `digest` stands for."""
        # A second block of equal content stays private: tables in use point at it.
        if self.prefix_cache and digest not in self._sealed:
            assert self._references[block] > 0, f"block {block} is sealed but not held"
            self._unseal(block)
            self._digests[block] = digest
            self._sealed[digest] = block

    def _unseal(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._sealed[digest]
            self._digests[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Re-derive everything from `tables`, one for each holder, and assert that it agrees."""
        held = Counter(block for table in tables for block in table)
        assert self._references == [held[block] for block in range(self.kv_blocks)], "reference counts are wrong"
        free = [*self._blank, *self._idle]
        assert sorted(free) == [block for block in range(self.kv_blocks) if not held[block]], "free blocks are wrong"
        assert all(self._digests[block] is None for block in self._blank), "a blank block has content"
        assert all(self._digests[block] is not None for block in self._idle), "a cached block has no content"
        sealed = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert sealed == self._sealed, "the index of contents is wrong"
