"""Rows that attend to random keys and values, for backends to be compared."""

from collections.abc import Sequence

import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.paged_step import PagedStep
from mell_gpu_worker.engine.reference_attention import ReferenceAttention


class PagedCase:
    """A pool of random keys and values, and rows that attend to them in layer 1."""

    def __init__(self, parts: Sequence[tuple[int, int]], shape: KvShape, heads: int) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._generator = torch.Generator(device).manual_seed(0)
        self._device = device
        blocks = [-(-(start + count) // shape.block_tokens) for start, count in parts]
        self.pool = KvPool(sum(blocks), shape, device)
        self.pool.data[: sum(blocks)] = self.random(sum(blocks), *self.pool.data.shape[1:])
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).tolist()
        self.rows = [
            StepRow(str(i), [0] * (start + count), 1, start, count, [order.pop() for _ in range(blocks[i])], None)
            for i, (start, count) in enumerate(parts)
        ]
        tokens = sum(row.count for row in self.rows)
        self.query = self.random(heads, tokens, shape.head_dim).transpose(0, 1).to(shape.dtype)
        kept = [self.random(tokens, shape.kv_heads, shape.head_dim).to(shape.dtype) for _ in range(2)]
        self.fresh = kept[0], kept[1]
        self.step = PagedStep(self.pool, self.rows, shape.dtype)
        self.step.store(1, *self.fresh)

    def random(self, *shape: int) -> torch.Tensor:
        """Return random numbers on the device."""
        return torch.randn(shape, device=self._device, generator=self._generator)

    def expected(self, kind: AttentionKind) -> torch.Tensor:
        """Return what the reference path gives in layer 1."""
        return ReferenceAttention().attend(self.step, 1, self.query, self.fresh, kind)
