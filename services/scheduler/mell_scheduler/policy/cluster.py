"""The cluster a policy packs: GPUs, items, moves under way, and ordered indices over free memory.

Owns every fact a policy decides from and keeps the indices in step; holds no preferences.
"""

from collections.abc import Collection, Iterator, Sequence
from heapq import merge
from typing import Protocol

from mell_scheduler.policy.base import GpuId, GpuSpec, GpuState, Item, ItemId, Move, Reason
from mell_scheduler.policy.free_index import FreeIndex
from mell_scheduler.policy.gpus import GpuRecord, ItemState

_LONGEST_BACKOFF = 6
"""Doublings of the rest after failed moves: at most 64 epochs."""

Pool = tuple[str, int]
"""GPUs that can stand for one another: model and capacity."""


class Watcher(Protocol):
    """A rule that keeps state of its own per item; called after each change of an intended place."""

    def item_added(self, item: ItemState) -> None:
        """It is on `item.gpu` now."""

    def item_removed(self, item: ItemState) -> None:
        """It is gone."""

    def item_moved(self, item: ItemState) -> None:
        """It is meant to be on `item.gpu` now, not where it was."""

    def gpu_removed(self, gpu: GpuRecord) -> None:
        """The GPU is gone, and all its items before it."""


class Cluster:
    """All GPUs and items. `hold_both_ends`: a moving item is charged at its source too."""

    def __init__(self, hold_both_ends: bool = True, cooldown_epochs: int = 0) -> None:
        self.hold_both_ends = hold_both_ends
        self._cooldown_epochs = cooldown_epochs
        self.gpus: dict[GpuId, GpuRecord] = {}
        self.items: dict[ItemId, ItemState] = {}
        self.epoch_number = 0
        self.watcher: Watcher | None = None
        self._by_slot: dict[int, GpuRecord] = {}
        self._active: dict[Pool, FreeIndex] = {}
        self._standby: dict[Pool, FreeIndex] = {}
        """Standby GPUs, the longest known first: light load stays on the same few."""
        self._fixed: dict[str, bool] = {}
        """Model -> whether its items cannot be moved."""
        self._maybe_over: dict[int, GpuRecord] = {}
        self._next_seq = 1

    # --- GPUs

    def add_gpu(self, spec: GpuSpec) -> GpuRecord:
        """Register an empty GPU as standby."""
        assert spec.gpu_id not in self.gpus, f"GPU {spec.gpu_id} is already known"
        assert self._fixed.setdefault(spec.model, spec.fixed) == spec.fixed, "one model, fixed and not"
        gpu = GpuRecord(spec, self._take_seq())
        self.gpus[spec.gpu_id] = gpu
        self._by_slot[gpu.slot] = gpu
        self._active.setdefault(self._pool(gpu), FreeIndex())
        self._standby.setdefault(self._pool(gpu), FreeIndex())
        self.refresh(gpu)
        return gpu

    def remove_gpu(self, gpu_id: GpuId) -> list[ItemState]:
        """Forget a GPU. Moves towards it fail; items physically there depart and are returned."""
        gpu = self.gpus[gpu_id]
        for item in list(gpu.items.values()):
            if item.source is not None:
                self.fail_move(item)
        lost = [*gpu.items.values(), *gpu.leaving.values()]
        for item in lost:
            self.remove(item)
        gpu.state = GpuState.DRAINING
        self.refresh(gpu)
        self._maybe_over.pop(gpu.slot, None)
        del self.gpus[gpu_id], self._by_slot[gpu.slot]
        if self.watcher is not None:
            self.watcher.gpu_removed(gpu)
        return lost

    def refresh(self, gpu: GpuRecord) -> None:
        """Bring a GPU's state and its place in the indices in step with what it holds."""
        self._settle_state(gpu)
        pool = self._pool(gpu)
        usable = not gpu.paused
        free = gpu.free if usable and gpu.state is GpuState.ACTIVE else None
        if free != gpu.indexed_free:
            if gpu.indexed_free is not None:
                self._active[pool].remove(gpu.indexed_free, gpu.slot)
            if free is not None:
                self._active[pool].add(free, gpu.slot)
            gpu.indexed_free = free
        ready = usable and gpu.state is GpuState.STANDBY
        if ready != gpu.listed_standby:
            (self._standby[pool].add if ready else self._standby[pool].remove)(0, gpu.slot)
            gpu.listed_standby = ready
        if gpu.over:
            self._maybe_over[gpu.slot] = gpu

    def _settle_state(self, gpu: GpuRecord) -> None:
        if gpu.state is GpuState.STANDBY and not gpu.empty:
            gpu.state = GpuState.ACTIVE
            gpu.activated = self._take_seq()
        elif gpu.state is GpuState.ACTIVE and gpu.empty:
            gpu.state = GpuState.STANDBY
        elif gpu.state is GpuState.DRAINING and gpu.empty:
            gpu.state = GpuState.RELEASED
        elif gpu.state is GpuState.RELEASED and not gpu.empty:
            gpu.state = GpuState.DRAINING

    def overloaded(self) -> list[GpuRecord]:
        """GPUs over a capacity, in order of arrival."""
        for slot in [slot for slot, gpu in self._maybe_over.items() if not gpu.over]:
            del self._maybe_over[slot]
        return [self._maybe_over[slot] for slot in sorted(self._maybe_over)]

    # --- items

    def put(self, item: Item, gpu: GpuRecord) -> ItemState:
        """A new item on a GPU, which it activates if need be."""
        assert item.item_id not in self.items, f"item {item.item_id} is already placed"
        state = ItemState(item, gpu, self._take_seq())
        self.items[item.item_id] = state
        gpu.add(state)
        self.refresh(gpu)
        if self.watcher is not None:
            self.watcher.item_added(state)
        return state

    def remove(self, item: ItemState) -> None:
        """The item is gone, from both ends if it was moving."""
        del self.items[item.item_id]
        item.gpu.discard(item)
        self.refresh(item.gpu)
        if item.source is not None:
            item.source.end_leaving(item)
            self.refresh(item.source)
        if self.watcher is not None:
            self.watcher.item_removed(item)

    def resize(self, item: ItemState, size: int, growth: int) -> None:
        """Change what an item is charged with, at both ends."""
        delta = size + growth - item.planned
        item.size, item.growth = size, growth
        if delta == 0:
            return
        item.gpu.used += delta
        self.refresh(item.gpu)
        if item.source is not None and item.held:
            item.source.used += delta
            self.refresh(item.source)

    def resize_many(self, gpu: GpuRecord, item_ids: Sequence[ItemId], sizes: Sequence[int]) -> list[int]:
        """One report's sizes, with one index update; returns positions of ids not physically on `gpu`."""
        strangers: list[int] = []
        here, total = gpu.items, 0
        for position, item_id in enumerate(item_ids):
            item = here.get(item_id)
            if item is not None and item.source is None:
                size = sizes[position]
                total += size - item.size
                item.size = size
            else:
                strangers.append(position)
        gpu.used += total
        strangers = [p for p in strangers if not self._resize_leaving(gpu, item_ids[p], sizes[p])]
        self.refresh(gpu)
        return strangers

    def _resize_leaving(self, gpu: GpuRecord, item_id: ItemId, size: int) -> bool:
        item = gpu.leaving.get(item_id)
        if item is None:
            return False
        self.resize(item, size, item.growth)
        return True

    # --- moves

    def begin_move(self, item: ItemState, target: GpuRecord, reason: Reason) -> Move:
        """Put a move in flight: the item is meant to be at `target`, and still is at its source."""
        source = item.gpu
        assert item.source is None, f"item {item.item_id} is already moving"
        assert target is not source, "a move needs two GPUs"
        assert not source.spec.fixed, "its items cannot be moved"
        source.start_leaving(item, self.hold_both_ends)
        item.source, item.gpu = source, target
        target.add(item)
        self.refresh(source)
        self.refresh(target)
        if self.watcher is not None:
            self.watcher.item_moved(item)
        return Move(item.item_id, source.gpu_id, target.gpu_id, item.planned, reason)

    def commit_move(self, item: ItemState) -> None:
        """The item is at its target."""
        source = item.source
        assert source is not None, f"item {item.item_id} is not moving"
        source.end_leaving(item)
        item.source = None
        item.failures = 0
        item.moved_epoch = self.epoch_number
        self.refresh(source)

    def fail_move(self, item: ItemState) -> None:
        """The item is back at its source, and rests: the longer, the more of its moves have failed."""
        item.rest_until_epoch = self.epoch_number + (1 << min(item.failures, _LONGEST_BACKOFF))
        item.failures += 1
        self.abort_move(item)

    def abort_move(self, item: ItemState) -> None:
        """The item is back at its source."""
        source, target = item.source, item.gpu
        assert source is not None, f"item {item.item_id} is not moving"
        target.discard(item)
        source.end_leaving(item)
        item.source, item.gpu = None, source
        source.add(item)
        self.refresh(target)
        self.refresh(source)
        if self.watcher is not None:
            self.watcher.item_moved(item)

    def may_move(self, item: ItemState) -> bool:
        """It holds something, does not move or back off after a failed move; its GPU is heard and can let it go."""
        gpu = item.gpu
        free = item.planned > 0 and item.source is None and not gpu.paused and not gpu.spec.fixed
        return free and item.rest_until_epoch <= self.epoch_number

    def may_move_rested(self, item: ItemState) -> bool:
        """May move for less than an overload or a drain: its rest since the last move is over."""
        rested = self.epoch_number - item.moved_epoch > self._cooldown_epochs
        return rested and self.may_move(item)

    # --- searches

    def fullest_with(self, model: str, blocks: int, head_room: float = 0.0) -> Iterator[GpuRecord]:
        """Active GPUs with room for `blocks`, keeping `head_room` of capacity free, the fullest first."""
        found = [
            (
                (self._by_slot[slot].indexed_free or 0, slot)
                for slot in index.ascending(blocks + int(pool[1] * head_room))
            )
            for pool, index in self._active.items()
            if pool[0] == model and index
        ]
        for _, slot in found[0] if len(found) == 1 else merge(*found):
            yield self._by_slot[slot]

    def emptiest(self, model: str) -> Iterator[GpuRecord]:
        """Active GPUs, the most free blocks first, whatever their room."""
        found = [
            ((-(self._by_slot[slot].indexed_free or 0), slot) for slot in index.descending())
            for pool, index in self._active.items()
            if pool[0] == model and index
        ]
        for _, slot in found[0] if len(found) == 1 else merge(*found):
            yield self._by_slot[slot]

    def standby_for(self, model: str, blocks: int, exclude: Collection[GpuId] = ()) -> GpuRecord | None:
        """The first of `standbys` not excluded."""
        return next((g for g in self.standbys(model, blocks) if g.gpu_id not in exclude), None)

    def standbys(self, model: str, blocks: int) -> Iterator[GpuRecord]:
        """Standby GPUs that hold `blocks`, the smallest and then the longest known first."""
        for pool in sorted(p for p in self._standby if p[0] == model and p[1] >= blocks):
            for slot in self._standby[pool].ascending(0):
                gpu = self._by_slot[slot]
                if gpu.free >= blocks:
                    yield gpu

    def active(self, model: str | None = None) -> list[GpuRecord]:
        """Active or draining GPUs, in order of arrival."""
        states = (GpuState.ACTIVE, GpuState.DRAINING)
        return [g for g in self.gpus.values() if g.state in states and model in (None, g.spec.model)]

    def at_slot(self, slot: int) -> GpuRecord:
        """The GPU of a slot that an index named."""
        return self._by_slot[slot]

    def models(self) -> list[str]:
        """Models whose items can be moved, in order of arrival."""
        return [model for model, fixed in self._fixed.items() if not fixed]

    def fixed(self, model: str) -> bool:
        """Whether a model's items cannot be moved."""
        return self._fixed.get(model, False)

    def _pool(self, gpu: GpuRecord) -> Pool:
        return gpu.spec.model, gpu.capacity

    def _take_seq(self) -> int:
        self._next_seq += 1
        return self._next_seq

    # --- proof

    def check(self) -> None:
        """Re-derive sums, states and indices from the items alone, and compare."""
        for gpu in self.gpus.values():
            _check_gpu(gpu)
        for item_id, item in self.items.items():
            assert item.item_id == item_id
            assert item.gpu.items[item_id] is item, "item not where it is meant to be"
            assert self.gpus[item.gpu.gpu_id] is item.gpu
            assert item.gpu.spec.model == item.model, "item on another model's GPU"
            if item.source is not None:
                assert item.source.leaving[item_id] is item, "moving item not leaving its source"
        listed = sum(len(g.items) for g in self.gpus.values())
        assert listed == len(self.items), "an item is listed twice or not at all"
        self._check_indices()

    def _check_indices(self) -> None:
        for pool, index in self._active.items():
            mine = [g for g in self.gpus.values() if self._pool(g) == pool and not g.paused]
            expected = sorted((g.free, g.slot) for g in mine if g.state is GpuState.ACTIVE)
            assert index.pairs() == expected, "free index out of step"
            waiting = {g.slot for g in mine if g.state is GpuState.STANDBY}
            assert {slot for _, slot in self._standby[pool].pairs()} == waiting, "standby list out of step"
        over = {g.slot for g in self.gpus.values() if g.over}
        assert over <= set(self._maybe_over), "an overloaded GPU is not listed"


def _check_gpu(gpu: GpuRecord) -> None:
    held = [i for i in gpu.leaving.values() if i.held]
    charged = [*gpu.items.values(), *held]
    assert gpu.used == sum(i.planned for i in charged), f"{gpu.gpu_id}: used blocks do not add up"
    assert gpu.count == len(charged), f"{gpu.gpu_id}: item count does not add up"
    assert all(i.gpu is gpu for i in gpu.items.values())
    assert all(i.source is gpu for i in gpu.leaving.values())
    idle = gpu.state in (GpuState.STANDBY, GpuState.RELEASED)
    assert idle == gpu.empty, f"{gpu.gpu_id}: {gpu.state} but empty is {gpu.empty}"
