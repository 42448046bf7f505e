"""A what-if copy of the free index: a plan of several moves is tried here and begun only when it is whole."""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from mell_scheduler.policy.base import Move, Reason
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1


@dataclass(slots=True)
class Trial:
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

    def emptiest(self, count: int) -> list[int]:
        """Up to `count` slots with the most room, the emptiest first."""
        return [key & _SLOT_MASK for key in self.keys[: -count - 1 : -1]]

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

    def copy(self) -> "Trial":
        """A trial that can go on and be thrown away."""
        return Trial(list(self.keys), dict(self.free), list(self.steps))


def trial_without(cluster: Cluster, victim: GpuRecord, head_room: float) -> Trial:
    """The GPUs in use that could take `victim`'s items, each keeping `head_room` of its capacity free."""
    free = {
        gpu.slot: gpu.free - int(head_room * gpu.capacity)
        for gpu in cluster.emptiest(victim.spec.model)
        if gpu is not victim and gpu.free > 0
    }
    return Trial(sorted((f << _SLOT_BITS) | slot for slot, f in free.items()), free)


def begin(trial: Trial, cluster: Cluster, reason: Reason) -> list[Move]:
    """Begin a trial's moves on the cluster."""
    return [cluster.begin_move(item, cluster.at_slot(slot), reason) for item, slot in trial.steps]
