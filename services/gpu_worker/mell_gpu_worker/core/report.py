"""The worker's report: its full state in columns, numbered, at a fixed rhythm."""

from mell_gpu_worker.core.batching import Batcher
from mell_shared.messages.scheduler import WorkerReport

_SMOOTHING = 0.1
"""Weight of the newest decode step in the mean step time."""


class Reporter:
    """Counts reports and keeps the mean time of a decode step."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self.number = 0
        """Of the next report."""
        self._step_us = 0.0

    def decode_took(self, step_us: int) -> None:
        """Take in the time of a step that only decoded."""
        old = self._step_us or step_us
        self._step_us = old + _SMOOTHING * (step_us - old)

    def report(self, batcher: Batcher, *, draining: bool) -> WorkerReport:
        """Return the next report."""
        number, self.number = self.number, self.number + 1
        # What is on its way here is its source's to report; its blocks count as used all the same.
        everybody = (*batcher.running, *batcher.waiting)
        rows = [row for row in everybody if not row.unclaimed]
        coming = [*batcher.arriving, *(row for row in everybody if row.unclaimed)]
        free_blocks = max(0, batcher.pool.free_blocks - batcher.withheld_blocks)
        return WorkerReport(
            worker=self._worker,
            number=number,
            free_blocks=free_blocks,
            used_blocks=batcher.pool.kv_blocks - free_blocks,
            draining=draining,
            step_us=round(self._step_us),
            preemptions=batcher.preemptions,
            reserved_blocks=sum(len(row.blocks) for row in coming),
            sequences=tuple(row.sequence for row in rows),
            generations=[row.generation for row in rows],
            tokens=[len(row.token_ids) for row in rows],
            blocks=[len(row.blocks) for row in rows],
            states=[int(row.phase) for row in rows],
        )
