"""Best fit without migration: each arrival goes to the fullest GPU that has room."""

from collections.abc import Collection

from mell_scheduler.policy.base import GpuId, Item, Move
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord


class BestFit:
    """Arrivals leave `head_room` of a GPU's capacity free; an empty GPU takes any item that fits."""

    def __init__(self, cluster: Cluster, head_room: float) -> None:
        self._cluster = cluster
        self._head_room = head_room

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """The fullest GPU with room, else a standby one."""
        blocks = item.size_blocks + item.growth_blocks
        for gpu in self._cluster.fullest_with(item.model, blocks, self._head_room):
            if gpu.gpu_id not in exclude:
                return gpu
        return self._cluster.standby_for(item.model, blocks, exclude)

    def plan(self, now_us: int) -> list[Move]:
        """No migration."""
        del now_us
        return []

    def check(self) -> None:
        """Keeps no state of its own."""
