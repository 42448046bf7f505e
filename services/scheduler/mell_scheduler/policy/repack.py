"""The default policy: few bytes moved, few GPUs.

- An arrival goes to the fullest GPU that keeps a little head-room, else to the emptiest in use.
- An overload is ended by the cheapest move that does it, placed by the same rule: the slack that is left
  at a target decides how soon it overflows in turn, and a fixed share of capacity balances moves and GPUs.
- A GPU whose emptying costs less than a price is emptied, if need be after making room elsewhere.

The head-room is the one dial: the smaller, the fewer GPUs and the more moves.
"""

from collections.abc import Collection

from mell_scheduler.policy.base import GpuId, Item, Move, PolicySettings, RepackSettings
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.consolidate import Consolidation, ConsolidationLimits
from mell_scheduler.policy.gpus import GpuRecord, ItemState
from mell_scheduler.policy.relief import Relief


class Repack:
    """`packing.Rule`: see the module."""

    def __init__(self, cluster: Cluster, settings: PolicySettings) -> None:
        self._cluster = cluster
        self._settings = settings
        repack = settings.repack
        self._keep = max(settings.head_room, repack.head_room)
        self._relief = Relief(cluster, self._find, repack.move_cost, self._keep)
        self._consolidation = Consolidation(
            cluster,
            ConsolidationLimits(
                price=repack.price,
                head_room=repack.target_head_room,
                candidates=repack.candidates,
                room_tries=0 if settings.hold_both_ends else repack.room_tries,
            ),
        )
        self._next_consolidation_us = -(1 << 62)

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """The fullest GPU that keeps the head-room, else the emptiest with room, else a standby one."""
        blocks = item.size_blocks + item.growth_blocks
        found = self._in_use(item.model, blocks, exclude)
        return found or self._cluster.standby_for(item.model, blocks, exclude)

    def _find(self, item: ItemState, source: GpuRecord) -> GpuRecord | None:
        return self._in_use(item.model, item.planned, (source.gpu_id,))

    def _in_use(self, model: str, blocks: int, exclude: Collection[GpuId]) -> GpuRecord | None:
        for gpu in self._cluster.fullest_with(model, blocks, self._keep):
            if gpu.gpu_id not in exclude:
                return gpu
        for gpu in self._cluster.emptiest(model):
            if gpu.free < blocks:
                return None
            if gpu.gpu_id not in exclude:
                return gpu
        return None

    def plan(self, now_us: int) -> list[Move]:
        """Overloads first; then, each period, GPUs worth emptying."""
        moves = list(self._relief.moves())
        if now_us < self._next_consolidation_us:
            return moves
        begun: list[Move] = []
        for model in self._cluster.models():
            begun += self._consolidation.moves(
                model,
                self._settings.max_moves_per_epoch - len(begun),
                self._settings.max_moved_blocks_per_epoch - sum(m.size_blocks for m in begun),
            )
        self._next_consolidation_us = now_us + self._settings.repack.period_us
        return moves + begun

    def check(self) -> None:
        """Keeps no state of its own."""


FRUGAL = RepackSettings(head_room=0.12, target_head_room=0.06, move_cost=0.1)
"""Half the moves of the default, for slow links: about 3% more GPUs."""
