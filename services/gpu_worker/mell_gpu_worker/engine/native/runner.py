"""Runs steps through the C++ decoder: lays out a step's rows as flat arrays and calls it once."""

import ctypes
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.kv_pool import KvPool
from mell_gpu_worker.engine.native.program import NativeProgram
from mell_gpu_worker.engine.native.structs import Pool, Step

_FIRST_POSITIONS = 1024
Ints = NDArray[np.int64]


class NativeRunner:
    """One program over one pool; between steps it keeps only memory and the cosines of positions seen so far."""

    def __init__(self, library: ctypes.CDLL, program: NativeProgram, pool: KvPool, threads: int) -> None:
        shape = pool.shape
        self._library = library
        self._program = program
        self._pool = pool
        self._threads = threads
        self._address = Pool(
            data=pool.data.data_ptr(),
            block_stride=pool.data.stride(0),
            page=shape.page_elements,
            block_tokens=shape.block_tokens,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        self._workspace = torch.empty(0)
        self._cosines = self._sines = torch.empty(0)

    def run(self, rows: Sequence[StepRow], kept: Sequence[int]) -> torch.Tensor:
        """Write the rows' KV and return float32 logits [kept, vocab]; see `Runner.run`."""
        size = self._pool.shape.block_tokens
        starts, counts = (np.array([getattr(row, name) for row in rows], dtype=np.int64) for name in ("start", "count"))
        lengths = -(-(starts + counts) // size)
        ids = _flat((row.token_ids[row.start : row.start + row.count] for row in rows), int(counts.sum()))
        tables = _flat((row.block_table[:n] for row, n in zip(rows, lengths, strict=True)), int(lengths.sum()))
        positions = _flat((range(row.start, row.start + row.count) for row in rows), len(ids))
        wanted = np.array(kept, dtype=np.int64)
        # C++ would read elsewhere, where torch raises.
        assert 0 <= ids.min() <= ids.max() < self._program.vocab, "a token id is outside the vocabulary"
        assert 0 <= tables.min() <= tables.max() < self._pool.blocks, "a block is outside the pool"
        self._pool.clear(new_tails(tables, lengths, starts, counts, size))
        self._reach(int(positions.max()) + 1)
        self._reserve(len(ids) * self._program.token_floats + len(wanted) * self._program.hidden)
        logits = torch.empty(len(wanted), self._program.vocab)
        step = Step(
            tokens=len(ids),
            ids=ids.ctypes.data,
            positions=positions.ctypes.data,
            cosines=self._cosines.data_ptr(),
            sines=self._sines.data_ptr(),
            rows=len(rows),
            counts=counts.ctypes.data,
            lengths=lengths.ctypes.data,
            tables=tables.ctypes.data,
            kept_count=len(wanted),
            kept=wanted.ctypes.data,
            logits=logits.data_ptr(),
            workspace=self._workspace.data_ptr(),
            threads=self._threads,
        )
        self._library.mell_step(ctypes.byref(self._program.decoder), ctypes.byref(self._address), ctypes.byref(step))
        return logits

    def _reach(self, positions: int) -> None:
        """Have cosines and sines of at least so many positions, from the model's own module."""
        if positions <= len(self._cosines):
            return
        reached = max(_FIRST_POSITIONS, 1 << (positions - 1).bit_length())
        cosines, sines = self._program.rotary(torch.empty(0), torch.arange(reached)[None])
        self._cosines, self._sines = cosines[0].contiguous(), sines[0].contiguous()

    def _reserve(self, floats: int) -> None:
        if self._workspace.numel() < floats:
            self._workspace = torch.empty(floats)


def new_tails(tables: Ints, lengths: Ints, starts: Ints, counts: Ints, block_tokens: int) -> list[int]:
    """Return the blocks that a step begins and does not fill: zeroed, they hold no NaN past their end."""
    ends = starts + counts
    begun = (ends % block_tokens != 0) & (starts <= ends // block_tokens * block_tokens)
    blocks: list[int] = tables[np.cumsum(lengths)[begun] - 1].tolist()
    return blocks


def _flat(parts: Iterable[Iterable[int]], count: int) -> Ints:
    return np.fromiter(chain.from_iterable(parts), dtype=np.int64, count=count)
