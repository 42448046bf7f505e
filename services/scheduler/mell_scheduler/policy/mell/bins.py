"""Units and bins: the paper's requests and GPUs as a plan sees them, which may differ from what is.

A unit is one item, or a multi-item: several small ones that are packed and moved as one T. A bin is a GPU
with the units that are meant to be there.
"""

from mell_scheduler.policy.base import ItemId, Reason
from mell_scheduler.policy.gpus import GpuRecord, ItemState, is_over, room
from mell_scheduler.policy.mell.sizes import SizeClass, class_of


class Unit:
    """What is packed as one. `reason` says why it was last taken off a bin."""

    __slots__ = ("bin", "cls", "members", "multi", "reason", "seq", "size")

    def __init__(self, members: list[ItemState], multi: bool, seq: int, bin_: "Bin") -> None:
        self.members: dict[ItemId, ItemState] = {m.item_id: m for m in members}
        self.multi = multi
        self.seq = seq
        self.bin = bin_
        self.reason = Reason.ATTACHED
        self.size = 0
        self.cls = SizeClass.T
        self.measure()

    def measure(self) -> None:
        """Take size and class from the members' present sizes."""
        self.size = sum(member.planned for member in self.members.values())
        self.cls = SizeClass.T if self.multi else class_of(self.size, self.bin.capacity)


class Bin:
    """A GPU and its units. `kind` is its class when it was last in order: the class of its largest unit."""

    __slots__ = ("activated", "capacity", "count", "gpu", "keys", "kind", "other", "sm_keys", "units", "used")

    def __init__(self, gpu: GpuRecord) -> None:
        self.gpu = gpu
        self.capacity = gpu.capacity
        self.units: dict[int, Unit] = {}
        self.used = 0
        self.other = gpu.other
        """Blocks of no known item, as of the last epoch: like sizes they are read by `measure` only."""
        self.count = 0
        self.activated = 0
        self.kind: SizeClass | None = None
        self.keys: dict[str, int] = {}
        """Under which numbers the shelf has filed this bin, by index."""
        self.sm_keys: dict[int, int] = {}
        """The same for its S and M units, by unit."""

    @property
    def slot(self) -> int:
        """The GPU's sequence number."""
        return self.gpu.slot

    @property
    def free(self) -> int:
        """The largest unit that can be added, by both capacities, once the plan is carried out."""
        return room(self.gpu.spec, self.used + self.other, self.count)

    @property
    def over(self) -> bool:
        """Above a capacity, once the plan is carried out."""
        return is_over(self.gpu.spec, self.used + self.other, self.count)

    @property
    def cls(self) -> SizeClass | None:
        """The class of the largest unit; None if empty."""
        return max((unit.cls for unit in self.units.values()), default=None)

    @property
    def three_quarters_full(self) -> bool:
        """The bar of the invariants on T-, M- and L-GPUs."""
        return 4 * self.free <= self.capacity

    def of_class(self, *classes: SizeClass) -> list[Unit]:
        """Its units of these classes, in order of their coming."""
        return [unit for unit in self.units.values() if unit.cls in classes]

    def add(self, unit: Unit) -> None:
        """The unit is meant to be here."""
        unit.bin = self
        self.units[unit.seq] = unit
        self.used += unit.size
        self.count += len(unit.members)

    def discard(self, unit: Unit) -> None:
        """The unit is not meant to be here any more."""
        del self.units[unit.seq]
        self.used -= unit.size
        self.count -= len(unit.members)

    def measure(self) -> None:
        """Take all sizes from the items' present ones."""
        self.other = self.gpu.other
        for unit in self.units.values():
            unit.measure()
        self.used = sum(unit.size for unit in self.units.values())
        self.count = sum(len(unit.members) for unit in self.units.values())
