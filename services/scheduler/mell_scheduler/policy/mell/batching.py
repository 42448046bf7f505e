"""Operation batching (MELL §VI-C): what happened since the last epoch becomes one plan, and that its moves.

Arrivals are placed at once where there is room now; all else waits for the epoch: sizes are read, then
units that changed class are re-allocated, overloads relieved, and every bin that changed is put in order.
The moves are the difference between the plan and what is, so a request moves at most once, never there
and back, and never if it departed. A planned move without room at its target now is dropped.
"""

from collections.abc import Collection, Iterator
from itertools import count

from mell_scheduler.policy.base import GpuId, GpuState, Item, ItemId, Move, PolicySettings, Reason
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState, is_over
from mell_scheduler.policy.mell.bins import Bin, Unit
from mell_scheduler.policy.mell.fig10 import Packing, Ports
from mell_scheduler.policy.mell.groups import join, leave, tidy
from mell_scheduler.policy.mell.shelf import Shelf
from mell_scheduler.policy.mell.sizes import SizeClass, is_small
from mell_scheduler.policy.relief import Relief


class Mell:
    """`packing.Rule` and `cluster.Watcher`."""

    def __init__(self, cluster: Cluster, settings: PolicySettings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._bins: dict[int, Bin] = {}
        self._unit_of: dict[ItemId, Unit] = {}
        self._packings: dict[str, Packing] = {}
        self._sequence = count(1)
        self._relief = Relief(cluster, self._tightest, settings.repack.move_cost, settings.repack.head_room)
        cluster.watcher = self

    # --- arrivals

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """Fig. 10's choice among GPUs with room now, else any GPU with room, else none."""
        probe = self._probe(item)
        if probe is None:
            return None
        packing = self._packing(item.model)

        def has_room_now(bin_: Bin, unit: Unit) -> bool:
            open_ = self._usable(bin_) and bin_.gpu.gpu_id not in exclude
            return open_ and bin_.gpu.free >= unit.size

        chosen = packing.choose(probe, has_room_now)
        if chosen is not None and has_room_now(chosen, probe):
            return chosen.gpu
        for gpu in self._cluster.fullest_with(item.model, probe.size):
            if gpu.gpu_id not in exclude:
                return gpu
        return self._cluster.standby_for(item.model, probe.size, exclude)

    def _probe(self, item: Item) -> Unit | None:
        """The arrival as a unit on no bin, to be classified; None if its model has no GPU."""
        like = next((g for g in self._cluster.gpus.values() if g.spec.model == item.model), None)
        if like is None:
            return None
        state = ItemState(item, like, 0)
        return Unit([state], is_small(state.planned, like.capacity), 0, self._bin(like))

    # --- what the cluster tells

    def item_added(self, item: ItemState) -> None:
        """A new item joins its bin."""
        bin_ = self._bin(item.gpu)
        self._unit_of[item.item_id] = join(bin_, item, self._next_seq)
        self._packing(item.model).touch(bin_)

    def item_removed(self, item: ItemState) -> None:
        """A departed item leaves its bin; Fig. 10's Depart follows in the epoch."""
        unit = self._unit_of.pop(item.item_id)
        leave(unit.bin, unit, item)
        self._packing(item.model).touch(unit.bin)

    def item_moved(self, item: ItemState) -> None:
        """A move began or failed. What this rule planned itself is in its bin already."""
        if self._unit_of[item.item_id].bin.gpu is item.gpu:
            return
        self.item_removed(item)
        self.item_added(item)

    def gpu_removed(self, gpu: GpuRecord) -> None:
        """Its bin is empty by now."""
        bin_ = self._bins.pop(gpu.slot, None)
        if bin_ is not None:
            assert not bin_.units, "a removed GPU still holds units"
            self._packing(gpu.spec.model).drop(bin_)

    # --- the epoch

    def plan(self, now_us: int) -> list[Move]:
        """Read sizes, re-allocate, relieve, put in order; then begin the moves that fit."""
        del now_us
        touched = list(self._bins.values())
        regraded = [unit for bin_ in touched for unit in self._read_sizes(bin_)]
        over = {bin_.slot for bin_ in touched if bin_.over}
        for unit in regraded:
            if unit.seq in unit.bin.units:
                self._packing_of(unit.bin).regrade(unit)
        for bin_ in touched:
            self._packing_of(bin_).relieve(bin_, Reason.OVERLOAD if bin_.slot in over else Reason.ATTACHED)
        for packing in self._packings.values():
            packing.restore()
        return [*self._begin_moves(), *self._relief.moves()]

    def _tightest(self, item: ItemState, source: GpuRecord) -> GpuRecord | None:
        """For overloads whose cure had no room yet, both ends counted: any GPU that has room now."""
        roomy = self._cluster.fullest_with(item.model, item.planned)
        return next((gpu for gpu in roomy if gpu is not source), None)

    def _read_sizes(self, bin_: Bin) -> list[Unit]:
        """Take a bin's present sizes; returns its units whose class has changed."""
        before = {seq: unit.cls for seq, unit in bin_.units.items()}
        bin_.measure()
        for unit in tidy(bin_, self._next_seq):
            before.setdefault(unit.seq, SizeClass.T)
        for unit in bin_.units.values():
            for item_id in unit.members:
                self._unit_of[item_id] = unit
        changed = [unit for seq, unit in bin_.units.items() if before.get(seq) != unit.cls]
        packing = self._packing_of(bin_)
        packing.shelf.file(bin_, self._usable(bin_))
        if bin_.over or changed:
            packing.touch(bin_)
        return changed

    def _begin_moves(self) -> list[Move]:
        """The plan's difference to what is, overloads first; what cannot begin now is planned back."""
        units = [unit for bin_ in self._bins.values() for unit in bin_.units.values() if self._displaced(unit)]
        units.sort(key=lambda unit: (unit.reason, unit.seq))
        moves: list[Move] = []
        for unit in units:
            if self._may_begin(unit, moves):
                displaced = [m for m in unit.members.values() if m.gpu is not unit.bin.gpu]
                moves += [self._cluster.begin_move(m, unit.bin.gpu, unit.reason) for m in displaced]
            else:
                self._plan_back(unit)
        return moves

    def _displaced(self, unit: Unit) -> bool:
        return any(member.gpu is not unit.bin.gpu for member in unit.members.values())

    def _may_begin(self, unit: Unit, moves: list[Move]) -> bool:
        gpu = unit.bin.gpu
        if self._cluster.hold_both_ends:
            if is_over(gpu.spec, gpu.used + gpu.other + unit.size, gpu.count + len(unit.members)):
                return False
        elif unit.bin.over and not gpu.over:
            return False  # what was to leave first has been planned back
        displaced = [m for m in unit.members.values() if m.gpu is not gpu]
        if unit.reason is not Reason.OVERLOAD and not all(self._cluster.may_move_rested(m) for m in displaced):
            return False
        settings = self._settings
        blocks = sum(move.size_blocks for move in moves) + unit.size
        within = len(moves) < settings.max_moves_per_epoch and blocks <= settings.max_moved_blocks_per_epoch
        return within or unit.reason is Reason.OVERLOAD

    def _plan_back(self, unit: Unit) -> None:
        """Members stay where they are meant to be already."""
        planned = unit.bin
        packing = self._packing_of(planned)
        for member in list(unit.members.values()):
            leave(planned, unit, member)
            self.item_added(member)
        packing.touch(planned)

    # --- access

    def bins_in_use(self) -> list[Bin]:
        """Bins that hold units, in order of their GPUs' arrival; for proofs."""
        return [self._bins[slot] for slot in sorted(self._bins) if self._bins[slot].units]

    def _bin(self, gpu: GpuRecord) -> Bin:
        bin_ = self._bins.get(gpu.slot)
        if bin_ is None:
            bin_ = self._bins[gpu.slot] = Bin(gpu)
        return bin_

    def _packing_of(self, bin_: Bin) -> Packing:
        return self._packing(bin_.gpu.spec.model)

    def _packing(self, model: str) -> Packing:
        if model not in self._packings:

            def empty_bins(size: int) -> Iterator[Bin]:
                return (self._bin(gpu) for gpu in self._cluster.standbys(model, size))

            ports = Ports(empty_bins, self._usable, self._movable, self._movable_at_need, self._next_seq)
            self._packings[model] = Packing(Shelf(), ports, self._settings.priority)
        return self._packings[model]

    def _usable(self, bin_: Bin) -> bool:
        gpu = bin_.gpu
        in_use = gpu.state in (GpuState.STANDBY, GpuState.ACTIVE)
        return in_use and not gpu.paused and gpu.gpu_id in self._cluster.gpus

    def _movable(self, unit: Unit) -> bool:
        return all(self._cluster.may_move_rested(member) for member in unit.members.values())

    def _movable_at_need(self, unit: Unit) -> bool:
        return all(self._cluster.may_move(member) for member in unit.members.values())

    def _next_seq(self) -> int:
        return next(self._sequence)

    def check(self) -> None:
        """Units and bins agree with the cluster's intended places, and the shelves with the bins."""
        for item_id, item in self._cluster.items.items():
            unit = self._unit_of[item_id]
            assert unit.members[item_id] is item
            assert unit.bin.gpu is item.gpu, "a unit is not where its item is meant to be"
            assert unit.bin.units[unit.seq] is unit
        assert len(self._unit_of) == len(self._cluster.items)
        for bin_ in self._bins.values():
            assert bin_.used == sum(unit.size for unit in bin_.units.values())
            assert bin_.count == sum(len(unit.members) for unit in bin_.units.values())
        for packing in self._packings.values():
            packing.shelf.check()
