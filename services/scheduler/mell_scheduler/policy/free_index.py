"""An ordered index of GPUs by free blocks: logarithmic search, and an update that moves only pointers."""

from bisect import bisect_left, insort
from collections.abc import Iterator

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1


class FreeIndex:
    """Slots ordered by (free blocks, slot). Keys are single integers, so comparisons stay in C."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: list[int] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, free: int, slot: int) -> None:
        """Insert a slot under its free blocks."""
        insort(self._keys, (free << _SLOT_BITS) | slot)

    def remove(self, free: int, slot: int) -> None:
        """Remove a slot; `free` must be what it was added with."""
        key = (free << _SLOT_BITS) | slot
        at = bisect_left(self._keys, key)
        assert self._keys[at] == key, "slot not indexed under this many free blocks"
        del self._keys[at]

    def ascending(self, least_free: int) -> Iterator[int]:
        """Slots with at least `least_free` blocks, the fullest first."""
        keys = self._keys
        for at in range(bisect_left(keys, least_free << _SLOT_BITS), len(keys)):
            yield keys[at] & _SLOT_MASK

    def descending(self) -> Iterator[int]:
        """All slots, the emptiest first."""
        for key in reversed(self._keys):
            yield key & _SLOT_MASK

    def up_to(self, most_free: int) -> Iterator[int]:
        """Slots with at most `most_free` blocks, the emptiest of them first."""
        keys = self._keys
        for at in range(bisect_left(keys, (most_free + 1) << _SLOT_BITS) - 1, -1, -1):
            yield keys[at] & _SLOT_MASK

    def pairs(self) -> list[tuple[int, int]]:
        """(free, slot) of all, for `check`."""
        return [(key >> _SLOT_BITS, key & _SLOT_MASK) for key in self._keys]
