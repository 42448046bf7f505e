"""Worst fit without migration: each arrival goes to the emptiest GPU in use that has room."""

from collections.abc import Collection

from mell_scheduler.policy.base import GpuId, Item, Move
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord


class WorstFit:
    """Arrivals leave `head_room` of a GPU's capacity free; an empty GPU takes any item that fits."""

    def __init__(self, cluster: Cluster, head_room: float) -> None:
        self._cluster = cluster
        self._head_room = head_room

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """The emptiest GPU in use if it has room, else a standby one."""
        blocks = item.size_blocks + item.growth_blocks
        for gpu in self._cluster.emptiest(item.model):
            if gpu.free < blocks:
                break
            if gpu.gpu_id not in exclude and gpu.free >= blocks + int(gpu.capacity * self._head_room):
                return gpu
        return self._cluster.standby_for(item.model, blocks, exclude)

    def plan(self, now_us: int) -> list[Move]:
        """No migration."""
        del now_us
        return []

    def check(self) -> None:
        """Keeps no state of its own."""
