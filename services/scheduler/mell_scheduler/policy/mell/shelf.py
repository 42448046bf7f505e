"""All bins of one model, filed in order under what Fig. 10 looks for. Every search is logarithmic."""

from collections.abc import Iterator

from mell_scheduler.policy.free_index import FreeIndex
from mell_scheduler.policy.mell.bins import Bin, Unit
from mell_scheduler.policy.mell.sizes import QUOTA, SizeClass

_LONELY = "lonely"


class Shelf:
    """Bins that may take units. After any change to a bin, `file` it again."""

    def __init__(self) -> None:
        self.bins: dict[int, Bin] = {}
        self._indices: dict[str, FreeIndex] = {_LONELY: FreeIndex()}
        for cls in SizeClass:
            self._indices[_age(cls)] = FreeIndex()
            self._indices[_room(cls)] = FreeIndex()
        for cls in (SizeClass.T, *QUOTA):
            self._indices[_open(cls)] = FreeIndex()
        self._sm = FreeIndex()
        self._sm_units: dict[int, Unit] = {}

    def file(self, bin_: Bin, usable: bool) -> None:
        """Bring every index in step with a bin; an unusable or empty one is in none."""
        keys = _keys(bin_) if usable else {}
        if keys != bin_.keys:
            for name, key in bin_.keys.items():
                if keys.get(name) != key:
                    self._indices[name].remove(key, bin_.slot)
            for name, key in keys.items():
                if bin_.keys.get(name) != key:
                    self._indices[name].add(key, bin_.slot)
            bin_.keys = keys
        self._file_units(bin_, usable)
        if usable:
            self.bins[bin_.slot] = bin_
        else:
            self.bins.pop(bin_.slot, None)

    def _file_units(self, bin_: Bin, usable: bool) -> None:
        """S and M units on S- and M-GPUs: what an L-GPU may pull in."""
        shown = usable and bin_.cls in (SizeClass.S, SizeClass.M)
        units = bin_.of_class(SizeClass.S, SizeClass.M) if shown else []
        keys = {unit.seq: unit.size for unit in units}
        if keys == bin_.sm_keys:
            return
        for seq, size in bin_.sm_keys.items():
            self._sm.remove(size, seq)
            del self._sm_units[seq]
        for unit in units:
            self._sm.add(unit.size, unit.seq)
            self._sm_units[unit.seq] = unit
        bin_.sm_keys = keys

    def latest(self, cls: SizeClass) -> Iterator[Bin]:
        """Bins of a class, the most recently activated first."""
        return (self.bins[slot] for slot in self._indices[_age(cls)].descending())

    def is_latest(self, bin_: Bin) -> bool:
        """The most recently activated of its class."""
        assert bin_.cls is not None
        return next(self.latest(bin_.cls), None) is bin_

    def open(self, cls: SizeClass) -> Iterator[Bin]:
        """M- or S-GPUs short of their quota, T-GPUs short of three quarters; the most recently activated first."""
        return (self.bins[slot] for slot in self._indices[_open(cls)].descending())

    def emptiest(self, cls: SizeClass) -> Iterator[Bin]:
        """Bins of a class, the most room first."""
        return (self.bins[slot] for slot in self._indices[_room(cls)].descending())

    def fullest_with(self, cls: SizeClass, size: int) -> Iterator[Bin]:
        """Bins of a class with room for `size`, the fullest first."""
        return (self.bins[slot] for slot in self._indices[_room(cls)].ascending(size))

    def lonely(self, size: int) -> Iterator[Bin]:
        """L-GPUs without an S or M whose L leaves room for `size`, T's not counted; the tightest first."""
        return (self.bins[slot] for slot in self._indices[_LONELY].ascending(size))

    def largest_sm(self, size: int) -> Iterator[Unit]:
        """S and M units on S- and M-GPUs of at most `size`, the largest first."""
        return (self._sm_units[seq] for seq in self._sm.up_to(size))

    def check(self) -> None:
        """Every bin is filed under what it is."""
        filed = {
            name: sorted((key, b.slot) for b in self.bins.values() for n, key in _keys(b).items() if n == name)
            for name in self._indices
        }
        for name, index in self._indices.items():
            assert index.pairs() == filed[name], f"bins out of step in {name}"
        shown = [b for b in self.bins.values() if b.cls in (SizeClass.S, SizeClass.M)]
        units = [u for b in shown for u in b.of_class(SizeClass.S, SizeClass.M)]
        assert self._sm.pairs() == sorted((u.size, u.seq) for u in units), "S and M units out of step"


def _keys(bin_: Bin) -> dict[str, int]:
    cls = bin_.cls
    if cls is None:
        return {}
    keys = {_age(cls): bin_.activated, _room(cls): bin_.free}
    if _is_open(bin_, cls):
        keys[_open(cls)] = bin_.activated
    if cls is SizeClass.L:
        others = bin_.of_class(SizeClass.S, SizeClass.M)
        larges = bin_.of_class(SizeClass.L)
        if not others and len(larges) == 1:
            keys[_LONELY] = bin_.capacity - bin_.other - larges[0].size
    return keys


def _is_open(bin_: Bin, cls: SizeClass) -> bool:
    if cls is SizeClass.T:
        return not bin_.three_quarters_full
    return cls in QUOTA and len(bin_.of_class(cls)) < QUOTA[cls]


def _age(cls: SizeClass) -> str:
    return f"age {cls.name}"


def _open(cls: SizeClass) -> str:
    return f"open {cls.name}"


def _room(cls: SizeClass) -> str:
    return f"room {cls.name}"
