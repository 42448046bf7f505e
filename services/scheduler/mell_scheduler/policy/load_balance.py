"""Load balancing, as Llumnix: worst fit, and migration from loaded GPUs to the least loaded one.

With drain, also Llumnix's scale-in: the least loaded GPU is emptied when the others can take its load.
"""

from collections.abc import Collection

from mell_scheduler.policy.base import GpuId, Item, Move, PolicySettings, Reason
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState
from mell_scheduler.policy.relief import Relief
from mell_scheduler.policy.trial import Trial, begin, trial_without
from mell_scheduler.policy.worst_fit import WorstFit


class LoadBalance:
    """GPUs filled above `high` send the item nearest to half the difference to the least loaded GPU."""

    def __init__(self, cluster: Cluster, settings: PolicySettings) -> None:
        self._cluster = cluster
        self._balance = settings.balance
        self._max_moves = settings.max_moves_per_epoch
        self._worst_fit = WorstFit(cluster, settings.head_room)
        self._relief = Relief(cluster, self._least_loaded_for, move_cost=0.0, slack=0.0)

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """Worst fit."""
        return self._worst_fit.choose(item, exclude)

    def plan(self, now_us: int) -> list[Move]:
        """Balancing moves, then whatever overload is left."""
        del now_us
        return [*self._balancing(), *self._relief.moves()]

    def _balancing(self) -> list[Move]:
        moves: list[Move] = []
        for model in self._cluster.models():
            for source in self._loaded(model):
                move = self._balance_one(source, model)
                if move is not None and len(moves) < self._max_moves:
                    moves.append(move)
        return moves

    def _loaded(self, model: str) -> list[GpuRecord]:
        loaded = []
        for gpu in self._cluster.fullest_with(model, -(1 << 30)):
            if _fill(gpu) <= self._balance.high:
                break
            loaded.append(gpu)
        return loaded

    def _balance_one(self, source: GpuRecord, model: str) -> Move | None:
        target = next(self._cluster.emptiest(model))
        gap = _fill(source) - _fill(target)
        if gap < self._balance.gap:
            return None
        half = int(gap * source.capacity / 2)
        fitting = [i for i in source.items.values() if self._cluster.may_move_rested(i) and i.planned <= target.free]
        smaller = [i for i in fitting if i.planned < 2 * half]
        if not smaller:
            return None
        nearest = min(smaller, key=lambda item: (abs(item.planned - half), item.seq))
        return self._cluster.begin_move(nearest, target, Reason.CONSOLIDATE)

    def _least_loaded_for(self, item: ItemState, source: GpuRecord) -> GpuRecord | None:
        for gpu in self._cluster.emptiest(item.model):
            if gpu is not source:
                return gpu if gpu.free >= item.planned else None
        return None

    def check(self) -> None:
        """Keeps no state of its own."""


class LoadBalanceDrain:
    """`LoadBalance`, and the least loaded GPU is emptied when the others stay at most `drain_below` full."""

    def __init__(self, cluster: Cluster, settings: PolicySettings) -> None:
        self._cluster = cluster
        self._balance = settings.balance
        self._balancer = LoadBalance(cluster, settings)
        self._next_drain_us = -(1 << 62)

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """Worst fit."""
        return self._balancer.choose(item, exclude)

    def plan(self, now_us: int) -> list[Move]:
        """Balancing moves, then at most one GPU emptied per model and period."""
        moves = self._balancer.plan(now_us)
        if now_us >= self._next_drain_us:
            self._next_drain_us = now_us + self._balance.drain_period_us
            for model in self._cluster.models():
                moves += self._empty_one(model)
        return moves

    def _empty_one(self, model: str) -> list[Move]:
        in_use = list(self._cluster.emptiest(model))
        if len(in_use) < 2 or not in_use[0].state_is_settled:
            return []
        if not all(self._cluster.may_move_rested(item) for item in in_use[0].items.values()):
            return []
        rest_capacity = sum(gpu.capacity for gpu in in_use[1:])
        load = sum(gpu.used + gpu.other for gpu in in_use)
        if load > self._balance.drain_below * rest_capacity:
            return []
        trial = _spread(in_use[0], trial_without(self._cluster, in_use[0], 0.0))
        return [] if trial is None else begin(trial, self._cluster, Reason.CONSOLIDATE)

    def check(self) -> None:
        """Keeps no state of its own."""


def _spread(victim: GpuRecord, trial: Trial) -> Trial | None:
    """Each item, the largest first, to the emptiest GPU; None if one does not fit."""
    for item in sorted(victim.items.values(), key=lambda i: -i.planned):
        target = next(iter(trial.emptiest(1)), None)
        if target is None or trial.free[target] < item.planned:
            return None
        trial.move(item, target)
    return trial


def _fill(gpu: GpuRecord) -> float:
    """How full, by the capacity that binds."""
    return 1.0 - gpu.free / gpu.capacity
