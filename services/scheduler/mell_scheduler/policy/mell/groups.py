"""The life cycle of multi-items on one bin: who joins, and when they split and merge. No move is needed for any.

After `tidy`, each multi-item is at most C/4, and at most one on a bin is at or below C/8.
"""

from collections.abc import Callable

from mell_scheduler.policy.gpus import ItemState
from mell_scheduler.policy.mell.bins import Bin, Unit
from mell_scheduler.policy.mell.sizes import is_small

NextSeq = Callable[[], int]


def join(bin_: Bin, item: ItemState, next_seq: NextSeq) -> Unit:
    """Add an item: as a unit, or, if small, to the fullest multi-item that stays at or below C/4."""
    small = is_small(item.planned, bin_.capacity)
    open_ = [u for u in bin_.units.values() if u.multi and 4 * (u.size + item.planned) <= bin_.capacity]
    if not small or not open_:
        unit = Unit([item], small, next_seq(), bin_)
        bin_.add(unit)
        return unit
    unit = max(open_, key=lambda u: (u.size, -u.seq))
    bin_.discard(unit)
    unit.members[item.item_id] = item
    unit.measure()
    bin_.add(unit)
    return unit


def leave(bin_: Bin, unit: Unit, item: ItemState) -> None:
    """Remove an item; an empty unit ends."""
    bin_.discard(unit)
    del unit.members[item.item_id]
    unit.measure()
    if unit.members:
        bin_.add(unit)


def tidy(bin_: Bin, next_seq: NextSeq) -> list[Unit]:
    """Let out members that outgrew C/8, split above C/4, merge at or below C/8; returns all units made."""
    made = [new for unit in _multi(bin_) for new in _let_out(bin_, unit, next_seq)]
    made += [new for unit in _multi(bin_) for new in _split(bin_, unit, next_seq)]
    while _merge(bin_):
        pass
    return [unit for unit in made if unit.seq in bin_.units]


def _multi(bin_: Bin) -> list[Unit]:
    return [unit for unit in bin_.units.values() if unit.multi]


def _let_out(bin_: Bin, unit: Unit, next_seq: NextSeq) -> list[Unit]:
    grown = [m for m in unit.members.values() if not is_small(m.planned, bin_.capacity)]
    for member in grown:
        leave(bin_, unit, member)
    singles = [Unit([member], False, next_seq(), bin_) for member in grown]
    for single in singles:
        bin_.add(single)
    return singles


def _split(bin_: Bin, unit: Unit, next_seq: NextSeq) -> list[Unit]:
    """Into two of nearly equal size, the largest members first to the smaller half."""
    if 4 * unit.size <= bin_.capacity:
        return []
    bin_.discard(unit)
    halves: tuple[list[ItemState], list[ItemState]] = ([], [])
    sizes = [0, 0]
    for member in sorted(unit.members.values(), key=lambda m: (-m.planned, m.seq)):
        half = int(sizes[1] < sizes[0])
        halves[half].append(member)
        sizes[half] += member.planned
    parts = [Unit(half, True, next_seq(), bin_) for half in halves]
    for part in parts:
        bin_.add(part)
    return [new for part in parts for new in (_split(bin_, part, next_seq) or [part])]


def _merge(bin_: Bin) -> bool:
    """Merge the two smallest multi-items if one is at or below C/8 and both fit into one."""
    groups = sorted(_multi(bin_), key=lambda u: (u.size, u.seq))
    if len(groups) < 2:
        return False
    small, other = groups[0], groups[1]
    if not is_small(small.size, bin_.capacity) or 4 * (small.size + other.size) > bin_.capacity:
        return False
    bin_.discard(small)
    bin_.discard(other)
    other.members.update(small.members)
    other.measure()
    bin_.add(other)
    return True
