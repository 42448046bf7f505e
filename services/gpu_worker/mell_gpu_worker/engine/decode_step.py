"""A step that only decodes, over inputs at addresses that stay: what can be recorded once and replayed."""

from collections.abc import Sequence

import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.kv_pool import KvPool
from mell_gpu_worker.engine.paged_step import Gather, Plan, additive_mask


class DecodeInputs:
    """What up to `rows` decodes read: `ids` and `positions` [rows], `table` [rows, blocks] of pool blocks, int32.

    Rows that a step does not fill are padding: token 0 at position 0 of the pool's scratch block. Only what changes of
    the table is written; what lies behind a row's blocks is the pool's zero block.
    """

    def __init__(self, pool: KvPool, rows: int, blocks: int) -> None:
        self._pool = pool
        on_gpu = pool.data.is_cuda
        self._tokens = torch.zeros((2, rows), dtype=torch.int64, pin_memory=on_gpu)
        self._table = torch.full((rows, blocks), pool.zero_block, dtype=torch.int32, pin_memory=on_gpu)
        self._held: list[list[int]] = [[] for _ in range(rows)]
        """The blocks that each row of the table holds."""
        self._sent = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        # The same memory, which Python writes to faster.
        self._token_values, self._table_values = self._tokens.numpy(), self._table.numpy()
        tokens = torch.zeros_like(self._tokens, device=pool.data.device)
        self.ids, self.positions = tokens
        self.table = torch.zeros_like(self._table, device=pool.data.device)
        self._device_tokens = tokens
        self.fill([])

    @property
    def rows(self) -> int:
        """How many rows there are, padding included."""
        return len(self._held)

    @property
    def most_tokens(self) -> int:
        """How many tokens the longest row may have, its new one included."""
        return self.table.shape[1] * self._pool.shape.block_tokens

    def fill(self, rows: Sequence[StepRow]) -> None:
        """Take a step's rows, each of one token; does not wait for the device."""
        if self._sent is not None:
            # Of the fill before, so that what it still reads from here is not overwritten.
            self._sent.synchronize()
        tokens = self._token_values
        tokens[0, : len(rows)] = [row.token_ids[row.start] for row in rows]
        tokens[1, : len(rows)] = [row.start for row in rows]
        tokens[:, len(rows) :] = 0
        self._device_tokens.copy_(self._tokens, non_blocking=True)
        if self._write_tables(rows):
            self.table.copy_(self._table, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _write_tables(self, rows: Sequence[StepRow]) -> bool:
        """Write what differs from what the table holds; return whether anything does."""
        size = self._pool.shape.block_tokens
        changed = False
        for place, row in enumerate(rows):
            blocks = row.block_table[: row.start // size + 1]
            if blocks != self._held[place]:
                self._hold(place, list(blocks))
                changed = True
        for place in range(len(rows), self.rows):
            if self._held[place] != [self._pool.scratch_block]:
                self._hold(place, [self._pool.scratch_block])
                changed = True
        return changed

    def _hold(self, place: int, blocks: list[int]) -> None:
        table = self._table_values
        held = self._held[place]
        kept = len(held) if blocks[: len(held)] == held else 0
        table[place, kept : len(blocks)] = blocks[kept:]
        table[place, len(blocks) : len(held)] = self._pool.zero_block
        self._held[place] = blocks


class DecodeStep:
    """Row i of the packed input is the next token of row i; all that follows from the inputs is computed on the device.

    `tiles` are those of the Triton kernels, each with the slots for a row of `most_tokens`.
    """

    def __init__(self, pool: KvPool, inputs: DecodeInputs) -> None:
        self.pool = pool
        self.layers_attended = 0
        self.table = inputs.table
        self.most_tokens = inputs.most_tokens
        self._positions = inputs.positions
        shape = pool.shape
        blocks = inputs.table.gather(1, (self._positions // shape.block_tokens)[:, None])[:, 0].long()
        self._slots = blocks * (shape.layers * 2 * shape.block_tokens) + self._positions % shape.block_tokens
        self._plans: dict[int | None, Plan] = {}

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one layer's new keys and values, each [rows, kv_heads, head_dim], to the pool."""
        self.pool.store(self._slots, layer, key, value)

    def plan(self, window: int | None) -> Plan:
        """Return one gather of all rows, padded to the longest that the table can hold."""
        if window not in self._plans:
            shape, device = self.pool.shape, self.table.device
            keys = torch.arange(self.most_tokens, device=device)[None, None, :]
            self._plans[window] = (
                Gather(
                    rows=len(self.table),
                    count=1,
                    packed=None,
                    pages=(self.table.long() * (shape.layers * 2)).flatten(),
                    mask=additive_mask(self._positions[:, None, None], keys, window, shape.dtype)[:, None],
                ),
            )
        return self._plans[window]

    def tiles(self, slots: int) -> torch.Tensor:
        """Return the Triton kernels' tiles, [rows, 5] int32, each with so many slots."""
        row = torch.arange(len(self.table), device=self.table.device)
        one = torch.ones_like(row)
        return torch.stack([row, row, self._positions, one, row * slots], dim=1).int()
