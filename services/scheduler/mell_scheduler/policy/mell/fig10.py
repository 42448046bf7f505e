"""Fig. 10's operations on bins (MELL §VI-C): allocate, re-allocate, relieve, and bringing a bin back in order.

All are plans: units change bins here, and `batching` turns the difference to what is into moves. The
paper's Depart is its remover's `touch` and then `restore`, which does for any bin what the paper does
after each kind of departure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from mell_scheduler.policy.base import PriorityWeights, Reason
from mell_scheduler.policy.mell.bins import Bin, Unit
from mell_scheduler.policy.mell.shelf import Shelf
from mell_scheduler.policy.mell.sizes import QUOTA, SizeClass

_CANDIDATES = 8
"""Bins compared by priority, out of those that a search finds first."""
_VISITS = 4
"""How often one plan brings a bin in order at most: what is left waits for the next epoch."""

Fits = Callable[[Bin, Unit], bool]


@dataclass(frozen=True, slots=True)
class Ports:
    """What a plan must ask of the cluster."""

    empty_bins: Callable[[int], Iterator[Bin]]
    """Standby bins that hold a size."""
    usable: Callable[[Bin], bool]
    movable: Callable[[Unit], bool]
    """For any reason but an overload: its rest since the last move is over."""
    movable_at_need: Callable[[Unit], bool]
    """For an overload."""
    next_seq: Callable[[], int]


class Packing:
    """The bins of one model."""

    def __init__(self, shelf: Shelf, ports: Ports, weights: PriorityWeights) -> None:
        self.shelf = shelf
        self._ports = ports
        self._weights = weights
        self._touched: dict[int, Bin] = {}
        self._vacated: dict[int, Bin] = {}
        """Emptied in this plan, and so not standing by yet: the first to be filled anew."""

    # --- changes to bins

    def touch(self, bin_: Bin) -> None:
        """The bin has changed: file it, and bring it in order in the next `restore`."""
        if bin_.units and not bin_.keys:
            bin_.activated = self._ports.next_seq()
            bin_.kind = None
        self.shelf.file(bin_, self._ports.usable(bin_))
        self._touched[bin_.slot] = bin_

    def drop(self, bin_: Bin) -> None:
        """The bin's GPU is gone."""
        self.shelf.file(bin_, usable=False)
        self._touched.pop(bin_.slot, None)
        self._vacated.pop(bin_.slot, None)

    def put(self, unit: Unit, target: Bin) -> None:
        """Plan a unit to be on a bin."""
        target.add(unit)
        self.touch(target)

    def take(self, unit: Unit, reason: Reason = Reason.ATTACHED) -> Bin:
        """Plan a unit to leave its bin, which is returned."""
        unit.reason = reason
        source = unit.bin
        source.discard(unit)
        self.touch(source)
        if not source.units:
            self._vacated[source.slot] = source
        return source

    # --- allocate

    def choose(self, unit: Unit, fits: Fits, avoid: Bin | None = None) -> Bin | None:
        """Fig. 10, Allocate: the bin for a unit that is on none. `fits` says whether there is room."""
        if unit.cls is SizeClass.T:
            return self._choose_for_t(unit, fits, avoid)
        if unit.cls in QUOTA:
            return self._choose_for_sm(unit, fits, avoid)
        return self._new_bin(unit, avoid)

    def _choose_for_t(self, unit: Unit, fits: Fits, avoid: Bin | None) -> Bin | None:
        """The best L-GPU, else the best M-GPU, else the latest T-GPU, else any, else a new one."""
        for cls in (SizeClass.L, SizeClass.M):
            best = self._best(self.shelf.emptiest(cls), unit, fits, avoid)
            if best is not None:
                return best
        latest = islice(self.shelf.latest(SizeClass.T), 1)
        others = islice(self.shelf.fullest_with(SizeClass.T, unit.size), _CANDIDATES)
        for bin_ in (*latest, *others):
            if bin_ is not avoid and bin_.free >= unit.size and fits(bin_, unit):
                return bin_
        return self._new_bin(unit, avoid)

    def _choose_for_sm(self, unit: Unit, fits: Fits, avoid: Bin | None) -> Bin | None:
        """The best L-GPU whose L leaves room, else the latest of its class that is not full, else a new one."""
        best = self._best(self.shelf.lonely(unit.size), unit, fits, avoid, to_evict=True)
        if best is not None:
            return best
        for bin_ in islice(self.shelf.open(unit.cls), _CANDIDATES):
            if bin_ is not avoid and self._room_with_eviction(bin_) >= unit.size and fits(bin_, unit):
                return bin_
        return self._new_bin(unit, avoid)

    def _best(
        self, found: Iterator[Bin], unit: Unit, fits: Fits, avoid: Bin | None, to_evict: bool = False
    ) -> Bin | None:
        """The highest priority among the first few with room; `to_evict`: T's there may make room."""
        candidates = []
        for bin_ in islice(found, _CANDIDATES):
            free = self._room_with_eviction(bin_) if to_evict else bin_.free
            if bin_ is not avoid and free >= unit.size and fits(bin_, unit):
                candidates.append(bin_)
        return max(candidates, key=lambda b: (self._priority(b, unit), -b.slot), default=None)

    def _priority(self, bin_: Bin, unit: Unit) -> float:
        """Fewer requests, more free memory, nearer to where the unit is."""
        near = bin_.gpu.spec.host == next(iter(unit.members.values())).at.spec.host
        weights = self._weights
        return weights.free * bin_.free / bin_.capacity - weights.load * len(bin_.units) / 8.0 + weights.distance * near

    def _new_bin(self, unit: Unit, avoid: Bin | None) -> Bin | None:
        empty = chain(self._vacated.values(), self._ports.empty_bins(unit.size))
        fits = (b for b in empty if not b.units and b.free >= unit.size and b is not avoid)
        return next((b for b in fits if self._ports.usable(b)), None)

    def reallocate(self, unit: Unit, reason: Reason = Reason.ATTACHED, avoid: Bin | None = None) -> bool:
        """Depart and allocate again, T's making room; with nowhere to go the unit stays, and False."""
        source = self.take(unit, reason)
        target = self.choose(unit, _anywhere, avoid)
        if target is None:
            self.put(unit, source)
            return False
        self._put_evicting(unit, target)
        return target is not source

    def _put_evicting(self, unit: Unit, target: Bin) -> None:
        """Put a unit on a bin; T's that no longer fit beside it are allocated elsewhere."""
        short = unit.size - target.free
        evicted = self._cheapest(target.of_class(SizeClass.T), short, self._ports.movable) if short > 0 else []
        sources = [self.take(t) for t in evicted]
        self.put(unit, target)
        for t, source in zip(evicted, sources, strict=True):
            elsewhere = self.choose(t, _anywhere, avoid=target)
            self.put(t, elsewhere or source)

    def _room_with_eviction(self, bin_: Bin) -> int:
        return bin_.free + sum(t.size for t in bin_.of_class(SizeClass.T) if self._ports.movable(t))

    @staticmethod
    def _cheapest(units: list[Unit], short: int, movable: Callable[[Unit], bool]) -> list[Unit]:
        """A cheap set of movable units that frees `short`: the smallest that does, else the largest first."""
        left = sorted((u for u in units if movable(u)), key=lambda u: (u.size, u.seq))
        chosen: list[Unit] = []
        while short > 0 and left:
            unit = next((u for u in left if u.size >= short), left[-1])
            left.remove(unit)
            chosen.append(unit)
            short -= unit.size
        return chosen

    # --- update

    def regrade(self, unit: Unit) -> None:
        """Fig. 10, Update: a unit has grown into another class. It stays if its bin is right for it."""
        bin_ = unit.bin
        self.touch(bin_)
        if not self._ports.movable(unit) or not self._ports.usable(bin_):
            return
        if unit.cls is SizeClass.L:
            if len(bin_.of_class(SizeClass.L)) > 1:
                self.reallocate(unit)
        elif unit.cls in QUOTA and not self._belongs(unit):
            self.reallocate(unit)

    def _belongs(self, unit: Unit) -> bool:
        bin_ = unit.bin
        if bin_.over:
            return False
        if bin_.cls is SizeClass.L:
            return len(bin_.of_class(SizeClass.S, SizeClass.M)) == 1
        alike = len(bin_.of_class(SizeClass.S, SizeClass.M)) == len(bin_.of_class(unit.cls))
        return alike and len(bin_.of_class(unit.cls)) <= QUOTA[unit.cls]

    def relieve(self, bin_: Bin, reason: Reason) -> None:
        """End an overload: the cheapest set of units, the largest one excepted, is allocated elsewhere.

        `reason` tells one that is there from one that only this plan would make.
        """
        if not bin_.over or not self._ports.usable(bin_):
            return
        largest = max(bin_.units.values(), key=lambda u: (u.size, -u.seq))
        others = [u for u in bin_.units.values() if u is not largest]
        movable = self._ports.movable_at_need if reason is Reason.OVERLOAD else self._ports.movable
        for unit in self._cheapest(others, -bin_.free, movable):
            self.reallocate(unit, reason, avoid=bin_)

    # --- depart, and whatever else leaves a bin out of order

    def restore(self) -> None:
        """Bring every touched bin in order, and those that this touches."""
        visits: dict[int, int] = {}
        while self._touched:
            slot = next(iter(self._touched))
            bin_ = self._touched.pop(slot)
            visits[slot] = visits.get(slot, 0) + 1
            if visits[slot] <= _VISITS and self._ports.usable(bin_):
                self._restore(bin_)
        self._vacated.clear()

    def _restore(self, bin_: Bin) -> None:
        was, bin_.kind = bin_.kind, bin_.cls
        if bin_.cls is None:
            return
        if was is not None and was > bin_.cls and (was is SizeClass.L or bin_.cls is SizeClass.T):
            self._clear(bin_)
        elif bin_.cls is SizeClass.L:
            self._pull(bin_)
            self._backfill(bin_)
        elif bin_.cls is SizeClass.T:
            self._restore_t()
        else:
            self._restore_sm(bin_)

    def _clear(self, bin_: Bin) -> None:
        """Its L, or its last S or M, has left: re-allocate everything else, the largest first."""
        for unit in sorted(bin_.units.values(), key=lambda u: (-u.size, u.seq)):
            if self._ports.movable(unit):
                self.reallocate(unit, avoid=bin_)

    def _pull(self, bin_: Bin) -> None:
        """An L-GPU without an S or M takes the largest that fits, from an S- or M-GPU."""
        room = bin_.keys.get("lonely")
        if room is None:
            return
        for unit in islice(self.shelf.largest_sm(room), _CANDIDATES):
            if self._ports.movable(unit) and self._room_with_eviction(bin_) >= unit.size:
                self.take(unit)
                self._put_evicting(unit, bin_)
                return

    def _restore_sm(self, bin_: Bin) -> None:
        """Its S's and M's go to L-GPUs that have room; what is missing comes from the latest of its class."""
        for unit in bin_.of_class(SizeClass.S, SizeClass.M):
            if self._ports.movable(unit) and next(self.shelf.lonely(unit.size), None) is not None:
                self.reallocate(unit)
        if bin_.cls in QUOTA:
            self._complete(bin_.cls)
        if bin_.cls is SizeClass.M:
            self._backfill(bin_)

    def _complete(self, cls: SizeClass) -> None:
        """At most one bin of a class is short of its quota: the oldest takes from the latest that is.

        If it is the only one, from the latest of all: unless it is that one itself.
        """
        open_ = list(islice(self.shelf.open(cls), _CANDIDATES))
        if not open_:
            return
        target = open_[-1]
        source = open_[0] if len(open_) > 1 else next(self.shelf.latest(cls))
        if source is target:
            return
        room = self._room_with_eviction(target)
        for unit in sorted(source.of_class(cls), key=lambda u: (-u.size, u.seq)):
            if unit.size <= room and self._ports.movable(unit):
                self.take(unit)
                self._put_evicting(unit, target)
                return

    def _restore_t(self) -> None:
        """At most the latest T-GPU is less than three quarters full: the oldest that is takes from the latest."""
        open_ = list(islice(self.shelf.open(SizeClass.T), _CANDIDATES))
        if open_ and not self.shelf.is_latest(open_[-1]):
            self._backfill(open_[-1])

    def _backfill(self, bin_: Bin) -> None:
        """Up to three quarters full with T's from the latest T-GPU."""
        while not bin_.three_quarters_full:
            latest = next((b for b in self.shelf.latest(SizeClass.T) if b is not bin_), None)
            fitting = [u for u in latest.units.values() if self._may_backfill(u, bin_)] if latest else []
            if not fitting:
                return
            unit = max(fitting, key=lambda u: (u.size, -u.seq))
            self.take(unit)
            self.put(unit, bin_)

    def _may_backfill(self, unit: Unit, bin_: Bin) -> bool:
        return unit.size <= bin_.free and self._ports.movable(unit)


def _anywhere(bin_: Bin, unit: Unit) -> bool:
    """In a plan, room on the bin is all that is needed."""
    del bin_, unit
    return True
