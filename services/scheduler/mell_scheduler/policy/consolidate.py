"""Empties GPUs: the cheapest to empty, if all it holds fits elsewhere, if need be after making room there.

A plan is tried on a copy of the free index and begun only when it is whole.
"""

from dataclasses import dataclass

from mell_scheduler.policy.base import Move, Reason
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState
from mell_scheduler.policy.trial import Trial, begin, trial_without


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
                begun += self._empty(gpu, budget_moves - len(begun), budget_blocks - _blocks(begun))
                spare -= gpu.capacity if gpu.empty or not gpu.items else 0
        return begun

    def _empty(self, gpu: GpuRecord, budget_moves: int, budget_blocks: int) -> list[Move]:
        trial = self._fit_all(gpu, trial_without(self._cluster, gpu, self._limits.head_room))
        if trial is None or len(trial.steps) > budget_moves:
            return []
        moved = sum(item.planned for item, _ in trial.steps)
        if moved > min(budget_blocks, self._limits.price * gpu.capacity):
            return []
        return begin(trial, self._cluster, Reason.CONSOLIDATE)

    def _fit_all(self, victim: GpuRecord, trial: Trial) -> Trial | None:
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

    def _make_room(self, item: ItemState, trial: Trial) -> Trial | None:
        """The cheapest way, over the emptiest GPUs, to shed enough there for `item` to fit."""
        best: Trial | None = None
        best_cost = 0
        for slot in trial.emptiest(self._limits.room_tries):
            shed = self._shed(slot, item.planned - trial.free[slot], trial)
            if shed is None:
                continue
            cost = sum(i.planned for i, _ in shed.steps)
            if best is None or cost < best_cost:
                shed.move(item, slot)
                best, best_cost = shed, cost
        return best

    def _shed(self, slot: int, need: int, trial: Trial) -> Trial | None:
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


def _with_steps(trial: Trial, source: int, items: list[ItemState], need: int = 0) -> Trial | None:
    """Move `items` off `source` until `need` blocks are freed; None if they are not."""
    trial = trial.copy()
    freed = 0
    for item in items:
        target = trial.tightest(item.planned, source)
        if target is None:
            continue
        trial.move(item, target, source)
        freed += item.planned
        if freed >= need:
            return trial
    return None


def _blocks(moves: list[Move]) -> int:
    return sum(move.size_blocks for move in moves)
