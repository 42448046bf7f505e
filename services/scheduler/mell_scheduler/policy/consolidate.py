"""Empties GPUs: the cheapest to empty, if all it holds fits elsewhere, if need be after making room there.

A plan is tried on a copy of the free index and begun only when it is whole.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from mell_scheduler.policy.base import Move, Reason
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1


@dataclass(frozen=True, slots=True)
class ConsolidationLimits:
    """What emptying a GPU may cost and how hard to look; shares are of a GPU's capacity."""

    price: float
    """Blocks moved to save one GPU, at most."""
    head_room: float
    """Targets keep this free."""
    candidates: int
    """GPUs tried per epoch, besides one per 32 GPUs in use."""
    room_tries: int
    """GPUs looked at to make room for an item that fits nowhere; 0 where freed memory cannot be reused at once."""


@dataclass(slots=True)
class _Trial:
    """Free blocks by GPU as they would be, and the moves that make them so."""

    keys: list[int]
    free: dict[int, int]
    steps: list[tuple[ItemState, int]] = field(default_factory=list)

    def tightest(self, blocks: int, avoid: int = -1) -> int | None:
        """The slot of the fullest GPU with room."""
        for at in range(bisect_left(self.keys, blocks << _SLOT_BITS), len(self.keys)):
            slot = self.keys[at] & _SLOT_MASK
            if slot != avoid:
                return slot
        return None

    def change(self, slot: int, delta: int) -> None:
        """Add to a GPU's free blocks."""
        old = self.free[slot]
        at = bisect_left(self.keys, (old << _SLOT_BITS) | slot)
        del self.keys[at]
        self.free[slot] = old + delta
        insort(self.keys, ((old + delta) << _SLOT_BITS) | slot)

    def move(self, item: ItemState, slot: int) -> None:
        """Add a step into `slot`."""
        self.change(slot, -item.planned)
        self.steps.append((item, slot))

    def copy(self) -> "_Trial":
        """A trial that can go on and be thrown away."""
        return _Trial(list(self.keys), dict(self.free), list(self.steps))


class Consolidation:
    """Finds and begins whole plans for emptying GPUs of one model."""

    def __init__(self, cluster: Cluster, limits: ConsolidationLimits) -> None:
        self._cluster = cluster
        self._limits = limits

    def moves(self, model: str, budget_moves: int, budget_blocks: int) -> list[Move]:
        """Empty as many GPUs as limits and budgets allow; the emptiest are tried first."""
        begun: list[Move] = []
        in_use = list(self._cluster.emptiest(model))
        spare = sum(max(0, gpu.free) for gpu in in_use)
        tries = self._limits.candidates + len(in_use) // 32
        for gpu in in_use[:tries]:
            if spare < gpu.capacity or gpu.used > self._limits.price * gpu.capacity:
                break
            if gpu.state_is_settled and all(self._cluster.may_move_rested(i) for i in gpu.items.values()):
                begun += self._empty(gpu, model, budget_moves - len(begun), budget_blocks - _blocks(begun))
                spare -= gpu.capacity if gpu.empty or not gpu.items else 0
        return begun

    def _empty(self, gpu: GpuRecord, model: str, budget_moves: int, budget_blocks: int) -> list[Move]:
        trial = self._fit_all(gpu, self._trial(gpu, model))
        if trial is None or len(trial.steps) > budget_moves:
            return []
        moved = sum(item.planned for item, _ in trial.steps)
        if moved > min(budget_blocks, self._limits.price * gpu.capacity):
            return []
        return [
            self._cluster.begin_move(item, self._cluster.at_slot(slot), Reason.CONSOLIDATE)
            for item, slot in trial.steps
        ]

    def _trial(self, victim: GpuRecord, model: str) -> _Trial:
        keep = self._limits.head_room
        free = {
            g.slot: g.free - int(keep * g.capacity)
            for g in self._cluster.emptiest(model)
            if g is not victim and g.free > 0
        }
        return _Trial(sorted((f << _SLOT_BITS) | slot for slot, f in free.items()), free)

    def _fit_all(self, victim: GpuRecord, trial: _Trial) -> _Trial | None:
        """Each item, the largest first, to the fullest GPU with room; None if one finds none."""
        for item in sorted(victim.items.values(), key=lambda i: -i.planned):
            slot = trial.tightest(item.planned)
            if slot is not None:
                trial.move(item, slot)
                continue
            roomier = self._make_room(item, trial)
            if roomier is None:
                return None
            trial = roomier
        return trial

    def _make_room(self, item: ItemState, trial: _Trial) -> _Trial | None:
        """The cheapest way, over the emptiest GPUs, to shed enough there for `item` to fit."""
        best: _Trial | None = None
        best_cost = 0
        for key in trial.keys[: -self._limits.room_tries - 1 : -1]:
            slot = key & _SLOT_MASK
            shed = self._shed(slot, item.planned - trial.free[slot], trial)
            if shed is None:
                continue
            cost = sum(i.planned for i, _ in shed.steps)
            if best is None or cost < best_cost:
                shed.move(item, slot)
                best, best_cost = shed, cost
        return best

    def _shed(self, slot: int, need: int, trial: _Trial) -> _Trial | None:
        """Move items off a GPU until `need` blocks are free: the smallest that suffices, else several."""
        moved = {item.item_id for item, _ in trial.steps}
        gpu = self._cluster.at_slot(slot)
        items = [i for i in gpu.items.values() if i.item_id not in moved and self._cluster.may_move_rested(i)]
        items.sort(key=lambda i: i.planned)
        single = next((i for i in items if i.planned >= need), None)
        if single is not None:
            target = trial.tightest(single.planned, slot)
            if target is not None:
                return _with_steps(trial, slot, [single])
        return _with_steps(trial, slot, [i for i in reversed(items) if i.planned <= 2 * need], need)


def _with_steps(trial: _Trial, source: int, items: list[ItemState], need: int = 0) -> _Trial | None:
    """Move `items` off `source` until `need` blocks are freed; None if they are not."""
    trial = trial.copy()
    freed = 0
    for item in items:
        target = trial.tightest(item.planned, source)
        if target is None:
            continue
        trial.move(item, target)
        trial.change(source, item.planned)
        freed += item.planned
        if freed >= need:
            return trial
    return None


def _blocks(moves: list[Move]) -> int:
    return sum(move.size_blocks for move in moves)
