"""Blocks lent to transfers: kept until the transfer is surely done with them, whoever else has let go of them."""

from collections import Counter
from collections.abc import Iterator, Sequence

from mell_gpu_worker.core.blocks import BlockPool


class Loans:
    """One reference of its own to each block that a migration's transfer may read or write."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._lent: dict[str, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._lent)

    def __iter__(self) -> Iterator[Sequence[int]]:
        """Yield the blocks of each transfer."""
        return iter(self._lent.values())

    def of(self, migration: str) -> Sequence[int]:
        """Return the blocks that a migration's transfer has."""
        return self._lent.get(migration, ())

    def lend(self, migration: str, blocks: Sequence[int]) -> None:
        """Lend blocks, which somebody holds, to a migration's transfer."""
        self._pool.share(blocks)
        self._lent.setdefault(migration, []).extend(blocks)

    def take_back(self, migration: str) -> None:
        """The transfer is done with all of a migration's blocks; nothing if it had none."""
        self._pool.release(self._lent.pop(migration, []))

    @property
    def coming_blocks(self) -> int:
        """Blocks that nobody else holds any more: free as soon as their transfers are closed."""
        counts = Counter(block for blocks in self._lent.values() for block in blocks)
        return sum(1 for block, count in counts.items() if self._pool.references(block) == count)
