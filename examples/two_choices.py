"""A policy of your own for Mell: the power of two choices. docs/extending.md goes through it.

PYTHONPATH=examples mell simulate paper:1.1 --policy repack,two_choices:TwoChoices
"""

from collections.abc import Collection
from hashlib import blake2b

from mell_scheduler.policy.base import GpuId, Item, Move, PolicySettings
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.gpus import GpuRecord, ItemState
from mell_scheduler.policy.relief import Relief


class TwoChoices:
    """Of two GPUs in use, drawn by the request's name, the emptier one; overloads are relieved by moves."""

    def __init__(self, cluster: Cluster, settings: PolicySettings) -> None:
        self._cluster = cluster
        self._head_room = settings.head_room
        self._relief = Relief(cluster, self._target_for, move_cost=0.1, slack=0.1)

    def choose(self, item: Item, exclude: Collection[GpuId]) -> GpuRecord | None:
        """A GPU for an arrival, or None: then it waits. An empty GPU only if none in use has room."""
        blocks = item.size_blocks + item.growth_blocks
        roomy = [
            gpu for gpu in self._cluster.fullest_with(item.model, blocks, self._head_room) if gpu.gpu_id not in exclude
        ]
        return _emptier(roomy, item.item_id) or self._cluster.standby_for(item.model, blocks, exclude)

    def plan(self, now_us: int) -> list[Move]:
        """The moves of an epoch: only what an overload needs."""
        del now_us
        return list(self._relief.moves())

    def check(self) -> None:
        """Asserts that own state agrees with the cluster; there is none."""

    def _target_for(self, item: ItemState, source: GpuRecord) -> GpuRecord | None:
        roomy = [gpu for gpu in self._cluster.fullest_with(item.model, item.planned) if gpu is not source]
        return _emptier(roomy, item.item_id)


def _emptier(gpus: list[GpuRecord], name: str) -> GpuRecord | None:
    """Of two drawn the emptier. By a digest, not by chance: the same events must give the same decisions."""
    if not gpus:
        return None
    drawn = blake2b(name.encode(), digest_size=8).digest()
    pair = [gpus[int.from_bytes(half, "big") % len(gpus)] for half in (drawn[:4], drawn[4:])]
    return max(pair, key=lambda gpu: gpu.free)
