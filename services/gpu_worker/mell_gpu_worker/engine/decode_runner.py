"""Runs steps that only decode by replaying what was recorded for so many rows; everything else as it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.attention import AttentionBackend, PagedCall
from mell_gpu_worker.engine.decode_step import DecodeInputs, DecodeStep
from mell_gpu_worker.engine.kv_pool import KvPool
from mell_gpu_worker.engine.runner import Runner, call_model
from mell_gpu_worker.engine.upload import upload

Compute = Callable[[], torch.Tensor]
Record = Callable[[Compute], Compute]
"""Returns what computes the same again from the same addresses, into the same tensor."""

MOST_TOKENS = 8192
"""Longer rows are not recorded for: all tables would be as wide, and slots for all their pieces kept."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Steps of up to `rows` decodes, each of up to `tokens` tokens, are recorded."""

    rows: int
    tokens: int

    def buckets(self) -> list[int]:
        """Return for how many rows to record, falling, so that small ones reuse the memory of large ones."""
        return sorted({self.rows, *(1 << power for power in range(self.rows.bit_length()))}, reverse=True)


class DecodeRunner:
    """A `StepRunner` that records at once; its logits are those of `Runner` for the padded number of rows."""

    def __init__(
        self, model: Any, pool: KvPool, backend: AttentionBackend, record: Record, limits: DecodeLimits
    ) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend
        self._others = Runner(model, pool, backend)
        blocks = -(-limits.tokens // pool.shape.block_tokens)
        self._inputs = {rows: DecodeInputs(pool, rows, blocks) for rows in limits.buckets()}
        with torch.inference_mode():
            self._replays = {rows: record(self._computation(inputs)) for rows, inputs in self._inputs.items()}

    def run(self, rows: Sequence[StepRow], kept: Sequence[int]) -> torch.Tensor:
        """Run one step; see `StepRunner`."""
        bucket = self._bucket(rows)
        if bucket is None:
            return self._others.run(rows, kept)
        size = self._pool.shape.block_tokens
        self._pool.clear([row.block_table[row.start // size] for row in rows if row.start % size == 0 and size > 1])
        self._inputs[bucket].fill(rows)
        logits = self._replays[bucket]()
        if list(kept) == list(range(len(rows))):
            # A copy: the next step writes to the same place.
            return logits[: len(rows)].to(torch.float32, copy=True)
        return logits.index_select(0, upload(np.array(kept, dtype=np.int64), logits.device)).float()

    def _bucket(self, rows: Sequence[StepRow]) -> int | None:
        """Return for how many rows the step's computation was recorded, if it was."""
        if any(row.count != 1 for row in rows):
            return None
        if max(row.start for row in rows) >= next(iter(self._inputs.values())).most_tokens:
            return None
        return min((bucket for bucket in self._inputs if bucket >= len(rows)), default=None)

    def _computation(self, inputs: DecodeInputs) -> Compute:
        every_row = torch.arange(inputs.rows, device=self._pool.data.device)

        def compute() -> torch.Tensor:
            paged = PagedCall(DecodeStep(self._pool, inputs), self._backend)
            return call_model(self._model, paged, inputs.ids, inputs.positions, every_row)

        return compute
