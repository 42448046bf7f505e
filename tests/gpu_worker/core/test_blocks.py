from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mell_gpu_worker.core.blocks import BlockPool, chain_digest, root_digest

ROOT = root_digest("model", "layout")
BLOCK_TOKENS = 4


def digests_of(token_ids: Sequence[int]) -> list[bytes]:
    """Chained digests of the full blocks of `token_ids`."""
    digests: list[bytes] = []
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        parent = digests[-1] if digests else ROOT
        digests.append(chain_digest(parent, token_ids[end - BLOCK_TOKENS : end]))
    return digests


def sealed_table(pool: BlockPool, digests: Sequence[bytes]) -> list[int]:
    """Blocks sealed with `digests`, held once."""
    table = pool.allocate(len(digests))
    for block, digest in zip(table, digests, strict=True):
        pool.seal(block, digest)
    return table


def test_a_new_pool_is_all_free_and_hands_out_each_block_once() -> None:
    """Allocation returns distinct blocks until none is free."""
    pool = BlockPool(5, BLOCK_TOKENS)
    blocks = [*pool.allocate(2), *pool.allocate(3)]
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert (pool.free_blocks, pool.used_blocks) == (0, 5)
    pool.check([blocks])


def test_allocating_more_than_is_free_is_a_bug() -> None:
    """The caller must ask `fits` first."""
    pool = BlockPool(2, BLOCK_TOKENS)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)


def test_releasing_more_often_than_held_is_a_bug() -> None:
    """A double free never goes unnoticed."""
    pool = BlockPool(2, BLOCK_TOKENS)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(table)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    """A token over a boundary needs one more block."""
    assert BlockPool(1, BLOCK_TOKENS).blocks_for(tokens) == blocks


def test_equal_beginnings_share_and_different_ones_do_not() -> None:
    """`cached` finds the longest equal run of blocks from the first on, and nothing after a difference."""
    pool = BlockPool(8, BLOCK_TOKENS)
    table = sealed_table(pool, digests_of(range(12)))
    assert pool.cached(digests_of(range(12))) == table
    assert pool.cached(digests_of([*range(8), 99, 99, 99, 99])) == table[:2]
    assert pool.cached(digests_of([7, *range(1, 12)])) == []


def test_the_chain_tells_equal_tokens_after_different_parents_apart() -> None:
    """The same four tokens at another place are another content."""
    once, twice = digests_of([1, 2, 3, 4]), digests_of([1, 2, 3, 4, 1, 2, 3, 4])
    assert once[0] == twice[0]
    assert twice[0] != twice[1]


def test_models_and_layouts_never_share() -> None:
    """Another model or KV layout has another root, also if the texts joined are equal."""
    assert len({root_digest("a", "bc"), root_digest("ab", "c"), root_digest("a", "b", "c")}) == 3


def test_released_content_counts_as_free_and_is_found_again() -> None:
    """A block nobody holds is free, yet its content can be shared until it is taken."""
    pool = BlockPool(3, BLOCK_TOKENS)
    digests = digests_of(range(8))
    table = sealed_table(pool, digests)
    pool.release(table)
    assert pool.free_blocks == 3
    assert pool.cached(digests) == table
    pool.share(table)
    assert pool.free_blocks == 1
    pool.check([table])


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    """Content is dropped only when nothing else is free."""
    pool = BlockPool(3, BLOCK_TOKENS)
    digests = digests_of(range(8))
    pool.release(sealed_table(pool, digests))
    held = pool.allocate(1)
    assert len(pool.cached(digests)) == 2
    held += pool.allocate(1)
    assert len(pool.cached(digests)) == 1, "the chain's tail goes before its head"
    pool.check([held])


def test_the_least_recently_used_content_goes_first() -> None:
    """Sharing a block and releasing it again makes it the newest."""
    pool = BlockPool(2, BLOCK_TOKENS)
    old, new = digests_of([1] * 4), digests_of([2] * 4)
    old_table, new_table = sealed_table(pool, old), sealed_table(pool, new)
    pool.release(old_table)
    pool.release(new_table)
    pool.share(old_table)
    pool.release(old_table)
    pool.allocate(1)
    assert pool.cached(old) == old_table
    assert pool.cached(new) == []


def test_fits_counts_revived_blocks_as_taken() -> None:
    """Sharing what nobody holds uses up free blocks too."""
    pool = BlockPool(3, BLOCK_TOKENS)
    table = sealed_table(pool, digests_of(range(8)))
    pool.release(table)
    assert pool.fits(table, 1)
    assert not pool.fits(table, 2)
    pool.share(table)
    assert pool.fits(table, 1), "shared a second time they cost nothing"
    assert not pool.fits(table, 2)


def test_a_second_block_of_equal_content_stays_private() -> None:
    """Two sequences that computed the same keep their own blocks; the first stays the one to share."""
    pool = BlockPool(4, BLOCK_TOKENS)
    digests = digests_of(range(4))
    first, second = sealed_table(pool, digests), sealed_table(pool, digests)
    assert pool.cached(digests) == first
    pool.release(second)
    assert pool.cached(digests) == first
    pool.check([first])


def test_without_a_prefix_cache_nothing_is_found() -> None:
    """Sealing has no effect when the cache is off."""
    pool = BlockPool(4, BLOCK_TOKENS, prefix_cache=False)
    table = sealed_table(pool, digests_of(range(8)))
    assert pool.cached(digests_of(range(8))) == []
    pool.release(table)
    pool.check([])


def test_check_notices_a_wrong_holder() -> None:
    """`check` fails when a table claims a block that was given back."""
    pool = BlockPool(2, BLOCK_TOKENS)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([table])


class PoolMachine(RuleBasedStateMachine):
    """Holders come, share, grow and go; a naive memory says what each block holds and when it was last used."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, BLOCK_TOKENS)
        self.twin = BlockPool(10, BLOCK_TOKENS)
        self.tables: list[list[int]] = []
        self.chains: list[list[bytes]] = []
        self.content: dict[int, bytes] = {}
        self.used: dict[int, int] = {}
        self.clock = 0

    @rule(pattern=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def hold(self, pattern: list[int]) -> None:
        """A holder of a chain of full blocks, each of one of two kinds, shares what it can and computes the rest."""
        digests = digests_of([token for token in pattern for _ in range(BLOCK_TOKENS)])
        shared = self.pool.cached(digests)
        assert shared == self.twin.cached(digests)
        assert shared == self.expected_run(digests)
        fresh = len(digests) - len(shared)
        fits = self.pool.fits(shared, fresh)
        idle = [block for block in shared if not self.holders(block)]
        assert fits == (len(idle) + fresh <= 10 - len({block for table in self.tables for block in table}))
        if not fits:
            return
        victims = self.expected_victims(fresh, keep=shared)
        for pool in (self.pool, self.twin):
            pool.share(shared)
        blocks = self.pool.allocate(fresh)
        assert blocks == self.twin.allocate(fresh), "the same calls give the same blocks"
        assert {block for block in blocks if block in self.content} == set(victims)
        self.write(shared + blocks, digests, len(shared))

    def write(self, table: list[int], digests: list[bytes], shared: int) -> None:
        """Note the contents of a new table, whose blocks after the first `shared` are fresh."""
        for block in table[shared:]:
            assert not self.holders(block), "a held block was handed out"
            self.content.pop(block, None)
        for block, digest in zip(table, digests, strict=True):
            self.pool.seal(block, digest)
            self.twin.seal(block, digest)
            if digest not in self.content.values():
                self.content[block] = digest
        self.tables.append(table)
        self.chains.append(digests)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        """A holder goes; what it computed stays until it is needed."""
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables.pop(index)
        del self.chains[index]
        self.pool.release(table)
        self.twin.release(table)
        for block in reversed(table):
            if not self.holders(block):
                self.clock += 1
                self.used[block] = self.clock

    @precondition(lambda self: self.tables and self.pool.free_blocks)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        """A holder takes one more block that is not full yet."""
        index = data.draw(st.integers(0, len(self.tables) - 1))
        victims = self.expected_victims(1, keep=[])
        (block,) = self.pool.allocate(1)
        assert [block] == self.twin.allocate(1)
        assert not self.holders(block)
        assert [block] == victims or (not victims and block not in self.content)
        self.content.pop(block, None)
        self.tables[index].append(block)

    def holders(self, block: int) -> int:
        """How many tables hold a block."""
        return sum(table.count(block) for table in self.tables)

    def expected_run(self, digests: list[bytes]) -> list[int]:
        """The longest run of contents in the naive memory."""
        where = {digest: block for block, digest in self.content.items()}
        run: list[int] = []
        for digest in digests:
            if digest not in where:
                break
            run.append(where[digest])
        return run

    def expected_victims(self, count: int, keep: list[int]) -> list[int]:
        """The cached blocks that must lose their content so that `count` can be handed out, oldest first."""
        free = [block for block in range(10) if not self.holders(block) and block not in keep]
        blank = [block for block in free if block not in self.content]
        cached = sorted((block for block in free if block in self.content), key=lambda block: self.used[block])
        return cached[: max(0, count - len(blank))]

    @invariant()
    def all_is_accounted_for(self) -> None:
        """Everything re-derived from the tables agrees, and a held block of a chain still has its content."""
        self.pool.check(self.tables)
        for table, chain in zip(self.tables, self.chains, strict=True):
            for block, digest in zip(table, chain, strict=False):
                assert self.content.get(block, digest) == digest, "a held block lost its content"


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
