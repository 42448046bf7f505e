"""The policy's protocol and its values: numbers only, no messages, clocks, IO or randomness.

A policy packs *items* (sequences, whose KV cache grows) into *GPUs* (bins of KV blocks). Its caller, the
scheduler core or the simulator, tells it what happened and carries out the moves it plans:

- An arrival: `allocate`. It names a GPU with room now, or None; it never needs a move first.
- A report: `update_gpu`, once per GPU and epoch; `depart` when a sequence ends.
- An epoch: `epoch` plans moves. Each is *in flight* from then until `moved` or `failed`, and while it is,
  memory is held at both ends: the item's intended place is the target, its actual place the source.
- An item that departs in flight is released at both ends; its move is settled by that.

The same calls in the same order give the same answers: ties break by order of arrival.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol

ItemId = str
GpuId = str


class GpuState(Enum):
    """Where a GPU stands, from the policy's side."""

    STANDBY = "standby"
    """Ready and empty: `allocate` and `epoch` may activate it."""
    ACTIVE = "active"
    """Holds items; goes back to standby by itself when the last one leaves."""
    DRAINING = "draining"
    """Takes nothing new; each epoch moves what it holds elsewhere."""
    RELEASED = "released"
    """Drained and empty: may be stopped. Takes nothing."""


class Reason(IntEnum):
    """Why a move is planned; the value is its urgency, the most urgent first."""

    OVERLOAD = 0
    DRAIN = 1
    ATTACHED = 2
    """Fig. 10's moves that come with an arrival, a departure or a change of class."""
    CONSOLIDATE = 3
    MANUAL = 4
    """An operator's: begun when it is asked for, never planned, so never waiting among others."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Predicted time of one decode step: base + items x per_item + blocks x per_block <= limit, in ns.

    The second capacity of a GPU; being linear, it folds into one number, the free blocks.
    """

    base_ns: int
    per_item_ns: int
    per_block_ns: int
    limit_ns: int


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """What a GPU (one worker incarnation) offers; `capacity_blocks` is its memory for KV."""

    gpu_id: GpuId
    capacity_blocks: int
    model: str = ""
    host: str = ""
    """Distance group: two GPUs of one host are near."""
    step: StepProfile | None = None
    fixed: bool = False
    """No item can be moved from here or to here. All GPUs of one `model` are alike in this."""


@dataclass(frozen=True, slots=True)
class Item:
    """A sequence to be packed. It is charged with size + growth: its size predicted for the epoch's end."""

    item_id: ItemId
    size_blocks: int
    model: str = ""
    growth_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """One migration to carry out; `size_blocks` is what is charged at each end while it is under way."""

    item_id: ItemId
    source: GpuId
    target: GpuId
    size_blocks: int
    reason: Reason

    @property
    def priority(self) -> int:
        """Urgency: 0 first."""
        return int(self.reason)


@dataclass(frozen=True, slots=True)
class RepackSettings:
    """The cost-aware default policy's trade between GPUs and moves; shares are of a GPU's capacity."""

    head_room: float = 0.032
    """What arrivals and overflow leave free where they can: the dial between GPUs and moves."""
    price: float = 0.6
    """Most blocks moved to save a GPU."""
    target_head_room: float = 0.03
    """What a consolidation leaves free at its targets."""
    move_cost: float = 0.03
    """The fixed cost of a move, whatever its size."""
    candidates: int = 4
    """GPUs that an epoch tries to empty, besides one for each 32 in use."""
    room_tries: int = 4
    """GPUs looked at to make room for an item that fits nowhere."""
    period_us: int = 0
    """Least time between two consolidations; 0: every epoch."""


@dataclass(frozen=True, slots=True)
class BalanceSettings:
    """Thresholds of the load-balancing baselines; shares are of a GPU's capacity."""

    high: float = 0.95
    """A GPU filled above this sends an item to the least loaded one."""
    gap: float = 0.1
    """Least difference in fill between source and target."""
    drain_below: float = 0.95
    """load-balance-drain empties a GPU when the others stay at or below this on average."""
    drain_period_us: int = 1_000_000


@dataclass(frozen=True, slots=True)
class PriorityWeights:
    """MELL's priority of a GPU: fewer items, more free memory, nearer (paper §VI-C)."""

    load: float = 1.0
    free: float = 1.0
    distance: float = 0.1


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Settings common to all policies, and each family's own."""

    head_room: float = 0.0
    """Share of a GPU's capacity that arrivals leave free for growth; an empty GPU takes any item that fits."""
    fixed_head_room: float | None = None
    """The same where nothing can be moved: on `fixed` GPUs, and for policies that move nothing. None: the same."""
    cooldown_epochs: int = 0
    """Epochs a moved item rests, except for overload and drain."""
    max_moves_per_epoch: int = 1_000_000
    max_moved_blocks_per_epoch: int = 1 << 60
    """Budgets for moves other than overload's."""
    hold_both_ends: bool = True
    """Count a move's memory at both ends while under way. False only where moves take no time."""
    repack: RepackSettings = RepackSettings()
    balance: BalanceSettings = BalanceSettings()
    priority: PriorityWeights = PriorityWeights()


class Policy(Protocol):
    """What the scheduler core and the simulator drive. No method blocks or reads a clock.

    Unknown ids raise KeyError: they are the caller's bug, except where a method says otherwise.
    """

    name: str

    def add_gpu(self, spec: GpuSpec) -> None:
        """Take a new, empty GPU as standby; follow with `place` for what it already holds."""

    def remove_gpu(self, gpu_id: GpuId) -> list[Item]:
        """Forget a lost or stopped GPU; returns the items that were physically there, which depart.

        Moves towards it fail: their items stay at their sources.
        """

    def drain_gpu(self, gpu_id: GpuId) -> None:
        """Take nothing new there, move everything away in the next epochs, then `RELEASED`."""

    def undrain_gpu(self, gpu_id: GpuId) -> None:
        """Make a draining or released GPU usable again."""

    def pause_gpu(self, gpu_id: GpuId) -> None:
        """No new items there for now (its reports are missing); what it holds stays."""

    def resume_gpu(self, gpu_id: GpuId) -> None:
        """End of `pause_gpu`."""

    def allocate(self, item: Item, exclude: Collection[GpuId] = ()) -> GpuId | None:
        """Place an arrival where there is room now; None when no GPU of its model has any."""

    def place(self, item: Item, gpu_id: GpuId) -> None:
        """Record that an item is on a GPU already, whatever the room (state rebuilt from reports)."""

    def depart(self, item_id: ItemId) -> None:
        """Forget an item that ended; releases both ends if it was in flight."""

    def update(self, item_id: ItemId, size_blocks: int, growth_blocks: int | None = None) -> None:
        """Set an item's size (and predicted growth; None keeps it)."""

    def update_gpu(self, gpu_id: GpuId, item_ids: Sequence[ItemId], size_blocks: Sequence[int]) -> list[int]:
        """Take one report: the sizes of a GPU's items. Much faster than as many `update`s.

        Returns the positions of ids that are unknown or not physically on this GPU (left untouched).
        """

    def set_other_blocks(self, gpu_id: GpuId, blocks: int) -> None:
        """Blocks used there by no known item; negative when items share prefix blocks."""

    def epoch(self, now_us: int) -> list[Move]:
        """Plan this epoch's moves, most urgent first; all are in flight on return."""

    def order_move(self, item_id: ItemId, gpu_id: GpuId) -> Move | None:
        """Begin a move that an operator wants; None if it moves already, or the target takes it not or has no room."""

    def relocate(self, item_id: ItemId) -> Move | None:
        """Begin to move an item that its GPU has no room for to where an arrival like it would go; None if nowhere."""

    def rehearse_drain(self, gpu_id: GpuId) -> list[tuple[ItemId, GpuId | None]]:
        """Where draining would move each of a GPU's items now (None: nowhere yet); nothing is begun or changed."""

    def rest(self, item_id: ItemId) -> None:
        """The item was moved just now by others than `epoch`: it rests like any moved one."""

    def moved(self, item_id: ItemId) -> None:
        """The item's move was committed: its source is freed."""

    def failed(self, item_id: ItemId) -> None:
        """The item's move failed or was not carried out: it is at its source, its target is freed."""

    def deferred(self, item_id: ItemId) -> None:
        """The item's move does not begin in this epoch: as `failed`, but it may be planned again in the next one."""

    def size_of(self, item_id: ItemId) -> int:
        """The item's size as last told, growth not included."""

    def gpu_of(self, item_id: ItemId) -> GpuId | None:
        """Where the item physically is; None if unknown."""

    def moving_to(self, item_id: ItemId) -> GpuId | None:
        """The target of the item's move under way; None if it has none or is unknown."""

    def items_on(self, gpu_id: GpuId) -> list[ItemId]:
        """The items physically on a GPU, those leaving it included, those coming to it not."""

    def gpu_ids(self) -> list[GpuId]:
        """All GPUs, in order of arrival."""

    def spec(self, gpu_id: GpuId) -> GpuSpec:
        """What the GPU was added with."""

    def state(self, gpu_id: GpuId) -> GpuState:
        """The GPU's state."""

    def used_blocks(self, gpu_id: GpuId) -> int:
        """Blocks charged there: residents, both ends of moves, other blocks."""

    def overloaded(self) -> list[GpuId]:
        """GPUs charged above a capacity, in order of arrival; the worker will have to preempt."""

    def gpus_wanted(self, model: str = "", queued_blocks: int = 0) -> int:
        """How many GPUs of a model should be up: those in use, and room for what is queued."""

    def check(self) -> None:
        """Re-derive every index and sum and assert that they agree. For tests; slow."""
