"""The policy protocol over a cluster, with two questions left to a rule: where to place, what to move."""

from collections.abc import Collection, Sequence
from math import ceil
from typing import Protocol

from mell_scheduler.policy.base import (
    GpuId,
    GpuSpec,
    GpuState,
    Item,
    ItemId,
    Move,
    PolicySettings,
    Reason,
)
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState


class Rule(Protocol):
    """A policy's preferences over a cluster it may read, and move items in only during `plan`."""

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """A GPU with room for an arrival now; may be a standby one."""

    def plan(self, now_us: int) -> list[Move]:
        """The epoch's moves, begun on the cluster."""

    def check(self) -> None:
        """Assert that the rule's own state, if any, agrees with the cluster."""


class PackingPolicy:
    """`base.Policy` around a rule. `fixed_rule` places, in its stead, where nothing placed can be moved later."""

    def __init__(self, name: str, cluster: Cluster, rule: Rule, fixed_rule: Rule) -> None:
        self.name = name
        self.cluster = cluster
        self.rule = rule
        self.fixed_rule = fixed_rule

    def add_gpu(self, spec: GpuSpec) -> None:
        """See `base.Policy`."""
        self.cluster.add_gpu(spec)

    def remove_gpu(self, gpu_id: GpuId) -> list[Item]:
        """See `base.Policy`."""
        return [item.as_item() for item in self.cluster.remove_gpu(gpu_id)]

    def drain_gpu(self, gpu_id: GpuId) -> None:
        """See `base.Policy`."""
        self._set_state(gpu_id, GpuState.DRAINING)

    def undrain_gpu(self, gpu_id: GpuId) -> None:
        """See `base.Policy`."""
        if self.state(gpu_id) in (GpuState.DRAINING, GpuState.RELEASED):
            self._set_state(gpu_id, GpuState.STANDBY)

    def _set_state(self, gpu_id: GpuId, state: GpuState) -> None:
        gpu = self.cluster.gpus[gpu_id]
        gpu.state = state
        self.cluster.refresh(gpu)

    def pause_gpu(self, gpu_id: GpuId) -> None:
        """See `base.Policy`."""
        self._set_paused(gpu_id, True)

    def resume_gpu(self, gpu_id: GpuId) -> None:
        """See `base.Policy`."""
        self._set_paused(gpu_id, False)

    def _set_paused(self, gpu_id: GpuId, paused: bool) -> None:
        gpu = self.cluster.gpus[gpu_id]
        gpu.paused = paused
        self.cluster.refresh(gpu)

    def allocate(self, item: Item, exclude: Collection[GpuId] = ()) -> GpuId | None:
        """See `base.Policy`."""
        rule = self.fixed_rule if self.cluster.fixed(item.model) else self.rule
        gpu = rule.choose(item, exclude)
        if gpu is None:
            return None
        self.cluster.put(item, gpu)
        return gpu.gpu_id

    def place(self, item: Item, gpu_id: GpuId) -> None:
        """See `base.Policy`."""
        self.cluster.put(item, self.cluster.gpus[gpu_id])

    def depart(self, item_id: ItemId) -> None:
        """See `base.Policy`."""
        self.cluster.remove(self.cluster.items[item_id])

    def update(self, item_id: ItemId, size_blocks: int, growth_blocks: int | None = None) -> None:
        """See `base.Policy`."""
        item = self.cluster.items[item_id]
        growth = item.growth if growth_blocks is None else growth_blocks
        self.cluster.resize(item, size_blocks, growth)

    def update_gpu(self, gpu_id: GpuId, item_ids: Sequence[ItemId], size_blocks: Sequence[int]) -> list[int]:
        """See `base.Policy`."""
        return self.cluster.resize_many(self.cluster.gpus[gpu_id], item_ids, size_blocks)

    def set_other_blocks(self, gpu_id: GpuId, blocks: int) -> None:
        """See `base.Policy`."""
        gpu = self.cluster.gpus[gpu_id]
        gpu.other = blocks
        self.cluster.refresh(gpu)

    def epoch(self, now_us: int) -> list[Move]:
        """See `base.Policy`."""
        self.cluster.epoch_number += 1
        moves = plan_drains(self.cluster, self.rule)
        moves += self.rule.plan(now_us)
        return sorted(moves, key=lambda move: move.reason)

    def order_move(self, item_id: ItemId, gpu_id: GpuId) -> Move | None:
        """See `base.Policy`."""
        item, target = self.cluster.items[item_id], self.cluster.gpus[gpu_id]
        takes = not target.paused and target.state in (GpuState.ACTIVE, GpuState.STANDBY)
        if item.source is not None or not takes or target.free < item.planned:
            return None
        return self.cluster.begin_move(item, target, Reason.MANUAL)

    def relocate(self, item_id: ItemId) -> Move | None:
        """See `base.Policy`."""
        item = self.cluster.items[item_id]
        if not self.cluster.may_move(item):
            return None
        target = self.rule.choose(item.as_item(), (item.gpu.gpu_id,))
        return None if target is None else self.cluster.begin_move(item, target, Reason.OVERLOAD)

    def rehearse_drain(self, gpu_id: GpuId) -> list[tuple[ItemId, GpuId | None]]:
        """See `base.Policy`."""
        gpu = self.cluster.gpus[gpu_id]
        coming = [item for item in gpu.items.values() if item.source is not None]
        leaving = {item.item_id: item.gpu.gpu_id for item in gpu.leaving.values()}
        state, order = gpu.state, list(gpu.items)
        self._set_state(gpu_id, GpuState.DRAINING)
        begun = [] if gpu.spec.fixed else drain_moves(self.cluster, self.rule, gpu, coming)
        targets = leaving | {move.item_id: move.target for move in begun}
        for move in reversed(begun):
            self.cluster.abort_move(self.cluster.items[move.item_id])
        gpu.items = {item_id: gpu.items[item_id] for item_id in order}  # an aborted move puts its item last
        self._set_state(gpu_id, state)
        return [(item_id, targets.get(item_id)) for item_id in self.items_on(gpu_id)]

    def rest(self, item_id: ItemId) -> None:
        """See `base.Policy`."""
        self.cluster.items[item_id].moved_epoch = self.cluster.epoch_number

    def moved(self, item_id: ItemId) -> None:
        """See `base.Policy`."""
        self.cluster.commit_move(self.cluster.items[item_id])

    def failed(self, item_id: ItemId) -> None:
        """See `base.Policy`."""
        self.cluster.fail_move(self.cluster.items[item_id])

    def deferred(self, item_id: ItemId) -> None:
        """See `base.Policy`."""
        self.cluster.abort_move(self.cluster.items[item_id])

    def size_of(self, item_id: ItemId) -> int:
        """See `base.Policy`."""
        return self.cluster.items[item_id].size

    def gpu_of(self, item_id: ItemId) -> GpuId | None:
        """See `base.Policy`."""
        item = self.cluster.items.get(item_id)
        return None if item is None else item.at.gpu_id

    def moving_to(self, item_id: ItemId) -> GpuId | None:
        """See `base.Policy`."""
        item = self.cluster.items.get(item_id)
        return None if item is None or item.source is None else item.gpu.gpu_id

    def items_on(self, gpu_id: GpuId) -> list[ItemId]:
        """See `base.Policy`."""
        gpu = self.cluster.gpus[gpu_id]
        return [*(i.item_id for i in gpu.items.values() if i.source is None), *gpu.leaving]

    def gpu_ids(self) -> list[GpuId]:
        """See `base.Policy`."""
        return list(self.cluster.gpus)

    def spec(self, gpu_id: GpuId) -> GpuSpec:
        """See `base.Policy`."""
        return self.cluster.gpus[gpu_id].spec

    def state(self, gpu_id: GpuId) -> GpuState:
        """See `base.Policy`."""
        return self.cluster.gpus[gpu_id].state

    def used_blocks(self, gpu_id: GpuId) -> int:
        """See `base.Policy`."""
        gpu = self.cluster.gpus[gpu_id]
        return gpu.used + gpu.other

    def overloaded(self) -> list[GpuId]:
        """See `base.Policy`."""
        return [gpu.gpu_id for gpu in self.cluster.overloaded()]

    def gpus_wanted(self, model: str = "", queued_blocks: int = 0) -> int:
        """See `base.Policy`."""
        up = self.cluster.active(model)
        largest = max((g.capacity for g in self.cluster.gpus.values() if g.spec.model == model), default=0)
        return len(up) + (ceil(queued_blocks / largest) if largest else int(queued_blocks > 0))

    def check(self) -> None:
        """See `base.Policy`."""
        self.cluster.check()
        self.rule.check()


def plan_drains(cluster: Cluster, rule: Rule) -> list[Move]:
    """Move what draining GPUs hold to where the rule would place it; what finds no room waits."""
    moves: list[Move] = []
    for gpu in list(cluster.gpus.values()):
        if gpu.state is not GpuState.DRAINING:
            continue
        moves += drain_moves(cluster, rule, gpu, [item for item in gpu.items.values() if not cluster.may_move(item)])
    return moves


def drain_moves(cluster: Cluster, rule: Rule, gpu: GpuRecord, but: Collection[ItemState]) -> list[Move]:
    """Begin to move a draining GPU's items, but for some, to where the rule would place them."""
    moves: list[Move] = []
    stay = {item.item_id for item in but}
    for item in [item for item in gpu.items.values() if item.item_id not in stay]:
        target = rule.choose(item.as_item(), ())
        if target is not None:
            moves.append(cluster.begin_move(item, target, Reason.DRAIN))
    return moves


def settings_cluster(settings: PolicySettings) -> Cluster:
    """An empty cluster for these settings."""
    return Cluster(settings.hold_both_ends, settings.cooldown_epochs)
