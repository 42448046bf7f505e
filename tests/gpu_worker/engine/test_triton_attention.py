import itertools
from typing import Any

import pytest
import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.paged_step import PagedStep
from mell_gpu_worker.engine.reference_attention import ReferenceAttention

PARTS = [(0, 13), (37, 1), (30, 22), (0, 1), (64, 1), (15, 2)]
"""(start, count) of rows that mix prefill, chunks and decode."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(9, 3, 64, 16), (4, 4, 24, 8), (8, 1, 128, 5), (2, 1, 256, 16)]
)
def test_the_kernel_equals_the_reference(heads: int, kv_heads: int, head_dim: int, block_tokens: int) -> None:
    """Windows, soft-caps and sinks give what the reference path gives, for ragged mixed rows.

    On CUDA, or where there is none in Triton's interpreter: `TRITON_INTERPRET=1 pytest -m gpu`, minutes for each shape.
    """
    from mell_gpu_worker.engine.triton_attention import TritonAttention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    shape = KvShape(2, block_tokens, kv_heads, head_dim, torch.float32)
    blocks = [-(-(start + count) // block_tokens) for start, count in PARTS]
    pool = KvPool(sum(blocks), shape, device)
    pool.data[:-1] = random(*pool.data[:-1].shape)
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).tolist()
    rows: list[Any] = [
        StepRow(str(i), [0] * (start + count), 1, start, count, [order.pop() for _ in range(blocks[i])], None)
        for i, (start, count) in enumerate(PARTS)
    ]
    step = PagedStep(pool, rows, torch.float32)
    tokens = sum(row.count for row in rows)
    query = random(heads, tokens, head_dim).transpose(0, 1)
    fresh = random(tokens, kv_heads, head_dim), random(tokens, kv_heads, head_dim)
    step.store(1, *fresh)
    for window, softcap, sinks in itertools.product([None, 7, 40], [None, 5.0], [None, random(heads)]):
        kind = AttentionKind(head_dim**-0.5, window, softcap, sinks)
        expected = ReferenceAttention().attend(step, 1, query, fresh, kind)
        torch.testing.assert_close(
            TritonAttention().attend(step, 1, query, fresh, kind), expected, atol=1e-4, rtol=1e-4
        )
