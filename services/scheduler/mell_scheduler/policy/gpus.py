"""State of GPUs and items: what is where, what is on its way, and how much room is left.

Knows nothing of any policy's preferences. All capacity sums are integers, in blocks.
"""

from mell_scheduler.policy.base import GpuId, GpuSpec, GpuState, Item, ItemId


class ItemState:
    """A packed item: `gpu` is where it is meant to be, `source` where it still is while moving."""

    __slots__ = (
        "failures",
        "gpu",
        "growth",
        "held",
        "item_id",
        "model",
        "moved_epoch",
        "rest_until_epoch",
        "seq",
        "size",
        "source",
    )

    def __init__(self, item: Item, gpu: "GpuRecord", seq: int) -> None:
        self.item_id: ItemId = item.item_id
        self.model = item.model
        self.size = item.size_blocks
        self.growth = item.growth_blocks
        self.gpu = gpu
        self.source: GpuRecord | None = None
        self.held = False
        """While moving: its memory is charged at the source too."""
        self.seq = seq
        self.moved_epoch = -(1 << 60)
        self.failures = 0
        self.rest_until_epoch = 0
        """No move before this epoch: the last one failed."""

    @property
    def planned(self) -> int:
        """What it is charged with: its size predicted for the end of the next epoch."""
        return self.size + self.growth

    @property
    def at(self) -> "GpuRecord":
        """Where it physically is."""
        return self.source or self.gpu

    def as_item(self) -> Item:
        """The value the caller knows it by."""
        return Item(self.item_id, self.size, self.model, self.growth)


def room(spec: GpuSpec, blocks: int, count: int) -> int:
    """The largest item that fits beside `count` items of `blocks` in all; negative if none does."""
    free = spec.capacity_blocks - blocks
    step = spec.step
    if step is None:
        return free
    left_ns = -_step_over_ns(spec, blocks, count) - step.per_item_ns
    if step.per_block_ns == 0:
        return free if left_ns >= 0 else min(free, -1)
    return min(free, left_ns // step.per_block_ns)


def is_over(spec: GpuSpec, blocks: int, count: int) -> bool:
    """`count` items of `blocks` in all are above a capacity."""
    return blocks > spec.capacity_blocks or _step_over_ns(spec, blocks, count) > 0


def _step_over_ns(spec: GpuSpec, blocks: int, count: int) -> int:
    step = spec.step
    if step is None:
        return 0
    return step.base_ns + count * step.per_item_ns + blocks * step.per_block_ns - step.limit_ns


class GpuRecord:
    """A GPU: `items` are meant to be here (incoming ones included), `leaving` are on their way out."""

    __slots__ = (
        "activated",
        "capacity",
        "count",
        "gpu_id",
        "indexed_free",
        "items",
        "leaving",
        "listed_standby",
        "other",
        "paused",
        "slot",
        "spec",
        "state",
        "used",
    )

    def __init__(self, spec: GpuSpec, slot: int) -> None:
        self.spec = spec
        self.gpu_id: GpuId = spec.gpu_id
        self.capacity = spec.capacity_blocks
        self.slot = slot
        self.state = GpuState.STANDBY
        self.paused = False
        self.activated = 0
        """Sequence number of its last activation: the greater, the more recent."""
        self.items: dict[ItemId, ItemState] = {}
        self.leaving: dict[ItemId, ItemState] = {}
        self.used = 0
        self.count = 0
        """Items charged here: residents, incoming, and leaving ones whose memory is still held."""
        self.other = 0
        self.indexed_free: int | None = None
        """Its key in the free index; None while it is not there."""
        self.listed_standby = False

    @property
    def free(self) -> int:
        """The largest item that can be added, by both capacities; may be negative."""
        return room(self.spec, self.used + self.other, self.count)

    @property
    def over(self) -> bool:
        """Charged above either capacity."""
        return is_over(self.spec, self.used + self.other, self.count)

    @property
    def over_after_moves(self) -> int:
        """Blocks that must still leave to end an overload, once all that is leaving has left."""
        if not self.over:
            return 0
        leaving = sum(item.planned for item in self.leaving.values() if item.held)
        return max(0, -self.free - leaving)

    @property
    def state_is_settled(self) -> bool:
        """In use, with nothing coming or leaving."""
        return not self.leaving and all(item.source is None for item in self.items.values())

    @property
    def empty(self) -> bool:
        """Nothing is here, coming or leaving."""
        return not self.items and not self.leaving

    def holds(self, item: ItemState) -> bool:
        """Physically here."""
        return item.at is self

    def add(self, item: ItemState) -> None:
        """Meant to be here from now on, and charged."""
        self.items[item.item_id] = item
        self._charge(item, 1)

    def discard(self, item: ItemState) -> None:
        """No longer meant to be here."""
        del self.items[item.item_id]
        self._charge(item, -1)

    def _charge(self, item: ItemState, sign: int) -> None:
        self.used += sign * item.planned
        self.count += sign

    def start_leaving(self, item: ItemState, hold: bool) -> None:
        """On its way out; with `hold` its memory stays charged."""
        del self.items[item.item_id]
        self.leaving[item.item_id] = item
        item.held = hold
        if not hold:
            self._charge(item, -1)

    def end_leaving(self, item: ItemState) -> None:
        """Gone, or back: in either case no longer leaving."""
        del self.leaving[item.item_id]
        if item.held:
            self._charge(item, -1)
        item.held = False
