"""A what-if copy of the free index: a plan of several moves is tried here and begun only when it is whole."""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from mell_scheduler.policy.base import Move, Reason
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState, room

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1


@dataclass(slots=True)
class Trial:
    """Free blocks by GPU as they would be, and the moves that make them so.

    A GPU's free blocks are the largest item it could still take, by both its capacities: one item more costs room of
    its own, beyond its blocks.
    """

    keys: list[int]
    free: dict[int, int]
    gpus: dict[int, GpuRecord]
    steps: list[tuple[ItemState, int]] = field(default_factory=list)
    changed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Slot -> blocks and items that the trial has added there."""

    def tightest(self, blocks: int, avoid: int = -1) -> int | None:
        """The slot of the fullest GPU with room."""
        for at in range(bisect_left(self.keys, blocks << _SLOT_BITS), len(self.keys)):
            slot = self.keys[at] & _SLOT_MASK
            if slot != avoid:
                return slot
        return None

    def emptiest(self, count: int) -> list[int]:
        """Up to `count` slots with the most room, the emptiest first."""
        return [key & _SLOT_MASK for key in self.keys[: -count - 1 : -1]]

    def move(self, item: ItemState, slot: int, source: int | None = None) -> None:
        """Add a step into `slot`; out of `source`, if that is a GPU of the trial."""
        self._change(slot, item.planned, 1)
        if source is not None:
            self._change(source, -item.planned, -1)
        self.steps.append((item, slot))

    def _change(self, slot: int, blocks: int, items: int) -> None:
        old, gpu = self.free[slot], self.gpus[slot]
        more_blocks, more_items = self.changed.get(slot, (0, 0))
        before = gpu.used + gpu.other + more_blocks, gpu.count + more_items
        after = before[0] + blocks, before[1] + items
        self.changed[slot] = more_blocks + blocks, more_items + items
        # By the difference: what was taken off as head-room stays off.
        new = old + room(gpu.spec, *after) - room(gpu.spec, *before)
        del self.keys[bisect_left(self.keys, (old << _SLOT_BITS) | slot)]
        self.free[slot] = new
        insort(self.keys, (new << _SLOT_BITS) | slot)

    def copy(self) -> "Trial":
        """A trial that can go on and be thrown away."""
        return Trial(list(self.keys), dict(self.free), self.gpus, list(self.steps), dict(self.changed))


def trial_without(cluster: Cluster, victim: GpuRecord, head_room: float) -> Trial:
    """The GPUs in use that could take `victim`'s items, each keeping `head_room` of its capacity free."""
    gpus = {gpu.slot: gpu for gpu in cluster.emptiest(victim.spec.model) if gpu is not victim and gpu.free > 0}
    free = {slot: gpu.free - int(head_room * gpu.capacity) for slot, gpu in gpus.items()}
    return Trial(sorted((f << _SLOT_BITS) | slot for slot, f in free.items()), free, gpus)


def begin(trial: Trial, cluster: Cluster, reason: Reason) -> list[Move]:
    """Begin a trial's moves on the cluster."""
    return [cluster.begin_move(item, cluster.at_slot(slot), reason) for item, slot in trial.steps]
