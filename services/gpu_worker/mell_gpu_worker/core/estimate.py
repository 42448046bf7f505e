"""Memory that somebody else manages: how far the core's tables are from it, and whether it can be reached at all."""

from mell_gpu_worker.core.batching import Batcher
from mell_gpu_worker.core.events import PoolMeasured


class Estimate:
    """Corrects what a batcher gives out by what an engine with memory of its own says of it."""

    def __init__(self, batcher: Batcher) -> None:
        self.away = False
        """Whether the engine was not to be reached when it was last looked for."""
        self._batcher = batcher
        self._had_waiting = False

    def take(self, measured: PoolMeasured) -> None:
        """Withhold what others hold there, and what it has not got; everything while it has no room for its own."""
        self.away = False
        pool = self._batcher.pool
        # One look may see requests that were sent this moment.
        short, self._had_waiting = self._had_waiting and measured.waiting > 0, measured.waiting > 0
        others = max(0, measured.used_blocks - pool.used_blocks)
        missing = max(0, pool.kv_blocks - measured.blocks)
        self._batcher.withheld_blocks = pool.kv_blocks if short else min(pool.kv_blocks, others + missing)
