"""Ends overloads: of a GPU above a capacity, the cheapest items whose leaving cures it are moved.

Used by every policy that migrates. Only into memory that is free now.
"""

from collections.abc import Callable, Iterator

from mell_scheduler.policy.base import Move, Reason
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState

FindTarget = Callable[[ItemState, GpuRecord], GpuRecord | None]
"""(item, its GPU) -> a GPU in use with room for it now."""


class Relief:
    """Cost of moving an item: (size + c) / (slack gained, up to `slack` of capacity, + c).

    So of items whose leaving gives the slack back the smallest goes, else the one that gives most: what
    barely cures an overload is soon followed by another. `move_cost` (c, a share of capacity) is the fixed
    cost of any move, in memory's terms; it decides between much slack and a small item.
    """

    def __init__(self, cluster: Cluster, find: FindTarget, move_cost: float, slack: float) -> None:
        self._cluster = cluster
        self._find = find
        self._move_cost = move_cost
        self._slack = slack

    def moves(self) -> Iterator[Move]:
        """Relieve every overloaded GPU as far as there is room, in order of GPUs' arrival."""
        for gpu in self._cluster.overloaded():
            while (over := gpu.over_after_moves) > 0:
                move = self._next_move(gpu, over)
                if move is None:
                    break
                yield move

    def _next_move(self, gpu: GpuRecord, over: int) -> Move | None:
        """One move that cures, into a GPU in use; else several that do; else one to a standby GPU."""
        movable = [i for i in gpu.items.values() if self._cluster.may_move(i)]
        curing = [i for i in movable if i.planned >= over]
        curing.sort(key=lambda item: self._cost(item, gpu, over))
        smaller = sorted((i for i in movable if i.planned < over), key=_size)
        for item in [*curing, *smaller]:
            target = self._find(item, gpu)
            if target is not None:
                return self._cluster.begin_move(item, target, Reason.OVERLOAD)
        for item in curing or reversed(smaller):
            target = self._cluster.standby_for(item.model, item.planned)
            if target is not None:
                return self._cluster.begin_move(item, target, Reason.OVERLOAD)
        return None

    def _cost(self, item: ItemState, gpu: GpuRecord, over: int) -> float:
        fixed = self._move_cost * gpu.capacity + 1.0
        gained = min(item.planned - over, self._slack * gpu.capacity)
        return (item.planned + fixed) / (gained + fixed)


def _size(item: ItemState) -> int:
    return item.planned
