"""First fit and round robin without migration: by the order in which GPUs arrived. Baselines; linear time."""

from collections.abc import Collection

from mell_scheduler.policy.base import GpuId, Item, Move
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord


class FirstFit:
    """The longest known GPU in use that has room, else a standby one."""

    def __init__(self, cluster: Cluster, head_room: float) -> None:
        self._cluster = cluster
        self._head_room = head_room

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """The first GPU with room."""
        blocks = item.size_blocks + item.growth_blocks
        roomy = self._cluster.fullest_with(item.model, blocks, self._head_room)
        first = min((g for g in roomy if g.gpu_id not in exclude), key=_slot, default=None)
        return first or self._cluster.standby_for(item.model, blocks, exclude)

    def plan(self, now_us: int) -> list[Move]:
        """No migration."""
        del now_us
        return []

    def check(self) -> None:
        """Keeps no state of its own."""


class RoundRobin:
    """The next GPU in use after the last one chosen that has room, else a standby one."""

    def __init__(self, cluster: Cluster, head_room: float) -> None:
        self._cluster = cluster
        self._head_room = head_room
        self._last = -1

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """The next GPU with room, cyclically."""
        blocks = item.size_blocks + item.growth_blocks
        roomy = self._cluster.fullest_with(item.model, blocks, self._head_room)
        turn = min((g for g in roomy if g.gpu_id not in exclude), key=self._turn, default=None)
        chosen = turn or self._cluster.standby_for(item.model, blocks, exclude)
        if chosen is not None:
            self._last = chosen.slot
        return chosen

    def _turn(self, gpu: GpuRecord) -> tuple[bool, int]:
        return gpu.slot <= self._last, gpu.slot

    def plan(self, now_us: int) -> list[Move]:
        """No migration."""
        del now_us
        return []

    def check(self) -> None:
        """Keeps no state of its own."""


def _slot(gpu: GpuRecord) -> int:
    return gpu.slot
