"""On CUDA, or where there is none in Triton's interpreter: `TRITON_INTERPRET=1 pytest -m gpu FILE`, 20 s a test."""

import itertools
from typing import Any

import pytest
import torch

from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.decode_step import DecodeInputs, DecodeStep
from mell_gpu_worker.engine.flash_attention import FlashAttention
from mell_gpu_worker.engine.kv_pool import KvShape
from mell_gpu_worker.engine.paged_step import PagedStep
from tests.gpu_worker.engine.paged_case import PagedCase
from tests.gpu_worker.engine.test_flash_attention import as_documented

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; Triton's interpreter has no bfloat16")

PARTS = [(0, 13), (37, 1), (30, 22), (0, 1), (64, 1), (15, 2)]
"""(start, count) of rows that mix prefill, chunks and decode."""
SPLIT_PARTS = [(n - 1, 1) for n in (511, 512, 513, 1023, 1024, 1025, 1600, 7)] + [(600, 3)]
"""Decodes that end around the places where keys are cut, and a chunk beyond one."""


def require_equal(case: PagedCase, kind: AttentionKind, tolerance: float) -> None:
    """Hold the kernels to the reference path."""
    from mell_gpu_worker.engine.triton_attention import TritonAttention

    found = TritonAttention().attend(case.step, 1, case.query, case.fresh, kind)
    torch.testing.assert_close(found, case.expected(kind), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(9, 3, 64, 16), (4, 4, 24, 8), (8, 1, 128, 5), (2, 1, 256, 16)]
)
def test_the_kernel_equals_the_reference(heads: int, kv_heads: int, head_dim: int, block_tokens: int) -> None:
    """Windows, soft-caps and sinks give what the reference path gives, for ragged mixed rows."""
    case = PagedCase(PARTS, KvShape(2, block_tokens, kv_heads, head_dim, torch.float32), heads)
    for window, softcap, sinks in itertools.product([None, 7, 40], [None, 5.0], [None, case.random(heads)]):
        require_equal(case, AttentionKind(head_dim**-0.5, window, softcap, sinks), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_cuda)])
def test_split_keys_equal_the_reference(dtype: torch.dtype) -> None:
    """The same for rows whose keys are cut: lengths around the cuts, windows that reach over several and into one."""
    case = PagedCase(SPLIT_PARTS, KvShape(2, 16, 2, 16, dtype), 6)
    sinks = case.random(6).to(dtype)
    for window, softcap, sink in [(None, None, None), (None, 5.0, sinks), (700, None, sinks), (40, 5.0, None)]:
        require_equal(case, AttentionKind(0.25, window, softcap, sink), 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flash_attention_takes_the_chunks_it_can(softcap: float | None) -> None:
    """And nothing else: decodes, and all of a layer that it does not compute, go through the kernels."""
    from mell_gpu_worker.engine.triton_attention import TritonAttention

    asked: list[int] = []

    def counted(query: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        asked.append(len(query))
        return as_documented(query, *arguments, **named)

    case = PagedCase(PARTS, KvShape(2, 16, 3, 64, torch.float32), 9)
    kind = AttentionKind(0.125, 40, softcap, None)
    found = TritonAttention(FlashAttention(counted)).attend(case.step, 1, case.query, case.fresh, kind)
    torch.testing.assert_close(found, case.expected(kind), atol=1e-4, rtol=1e-4)
    assert asked == ([] if softcap else [sum(count for _, count in PARTS if count > 1)])


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("programs", [1, 3, 8192])
def test_a_decode_is_the_same_in_any_batch_and_grid(
    window: int | None, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, beside longer rows or alone, also where alone its keys are not cut at all."""
    from mell_gpu_worker.engine import triton_attention

    case = PagedCase(SPLIT_PARTS, KvShape(2, 16, 2, 16, torch.float32), 6)
    kind = AttentionKind(0.25, window, None, case.random(6))
    alone = []
    for index, row in enumerate(case.rows[:8]):
        step = PagedStep(case.pool, [row], torch.float32)
        query, fresh = case.query[index : index + 1], (case.fresh[0][:1], case.fresh[1][:1])
        alone.append(triton_attention.TritonAttention().attend(step, 1, query, fresh, kind))
    monkeypatch.setattr(triton_attention, "_PROGRAMS", programs)
    together = triton_attention.TritonAttention().attend(case.step, 1, case.query, case.fresh, kind)
    assert torch.equal(together[:8], torch.cat(alone))


@pytest.mark.parametrize("window", [None, 600])
def test_a_recorded_step_attends_like_a_plain_one(window: int | None) -> None:
    """Over persistent inputs, padded to more rows and longer tables, each row has the same bits."""
    from mell_gpu_worker.engine.triton_attention import TritonAttention

    case = PagedCase(SPLIT_PARTS[:5], KvShape(2, 16, 2, 16, torch.float32), 6)
    inputs = DecodeInputs(case.pool, 8, 128)
    inputs.fill(case.rows)
    step = DecodeStep(case.pool, inputs)
    padding = torch.zeros(3, *case.query.shape[1:], device=case.query.device)
    query = torch.cat([case.query, padding])
    key, value = (torch.cat([fresh, torch.zeros(3, 2, 16, device=fresh.device)]) for fresh in case.fresh)
    before = case.pool.data[: case.pool.blocks].clone()
    step.store(1, key, value)
    assert torch.equal(case.pool.data[: case.pool.blocks], before), "stored elsewhere than a plain step does"
    kind = AttentionKind(0.25, window, None, None)
    expected = TritonAttention().attend(case.step, 1, case.query, case.fresh, kind)
    found = TritonAttention().attend(step, 1, query, (key, value), kind)
    assert torch.equal(found[:5], expected)
