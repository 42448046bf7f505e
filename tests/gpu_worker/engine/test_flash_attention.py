"""FlashAttention's inputs, on a stand-in for `varlen_attn` that does what torch documents of it; itself on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from mell_gpu_worker.engine import torch_engine
from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.flash_attention import FlashAttention, find_flash_attention
from mell_gpu_worker.engine.kv_pool import KvShape
from mell_gpu_worker.engine.reference_attention import ReferenceAttention
from tests.gpu_worker.engine.conftest import MakeEngine
from tests.gpu_worker.engine.paged_case import PagedCase

CHUNKS = [(0, 13), (30, 22), (15, 2), (0, 16), (64, 3)]
MIXED = [(0, 13), (37, 1), (30, 22), (0, 1), (64, 1), (15, 2)]


def attend(flash: FlashAttention, case: PagedCase, kind: AttentionKind) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what it writes, and which of the packed tokens are of chunks."""
    chunks = [span for span in case.step.spans if span.count > 1]
    blocks = max(len(span.blocks) for span in chunks)
    table = torch.tensor([[*span.blocks, *[0] * (blocks - len(span.blocks))] for span in chunks], dtype=torch.int32)
    laid_out = flash.lay_out(chunks, table.to(case.query.device), len(case.query))
    out = torch.full_like(case.query, torch.nan)
    flash.attend(laid_out, case.pool, 1, (out, case.query), kind)
    of_chunks = torch.zeros(len(case.query), dtype=torch.bool, device=case.query.device)
    for span in chunks:
        of_chunks[span.first : span.first + span.count] = True
    return out, of_chunks


def as_documented(  # noqa: PLR0917 (torch's signature)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    no_ends: None,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    **others: Any,
) -> torch.Tensor:
    """Causal from the last key and query backwards, over pages of keys; every number in it is looked at."""
    assert no_ends is None
    assert others == {"enable_gqa": True, "num_splits": 1}
    assert {ends.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert (window_size[1], most_keys) == (0, int(seqused_k.max()))
    counts = (ends[1:] - ends[:-1]).tolist()
    assert (most_queries, sum(counts)) == (max(counts), len(query))
    out = torch.empty_like(query)
    for row, (count, seen) in enumerate(zip(counts, seqused_k.tolist(), strict=True)):
        keys, values = (pages[block_table[row].long()].flatten(0, 1)[:seen] for pages in (key, value))
        repeats = query.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(repeats, 1).transpose(0, 1) for part in (keys, values))
        at = slice(int(ends[row]), int(ends[row + 1]))
        behind = torch.arange(seen - count, seen)[:, None] - torch.arange(seen)[None]
        hidden = (behind < 0) | ((behind > window_size[0]) if window_size[0] >= 0 else torch.tensor(False))
        scores = (query[at].transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        out[at] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize("parts", [CHUNKS, MIXED], ids=["chunks", "mixed"])
@pytest.mark.parametrize("window", [None, 7, 40])
def test_chunks_get_what_the_reference_path_gives(parts: list[tuple[int, int]], window: int | None) -> None:
    """Whether they are all of the step or lie between decodes, whose rows stay as they are."""
    case = PagedCase(parts, KvShape(2, 16, 3, 24, torch.float32), 9)
    kind = AttentionKind(0.3, window, None, None)
    out, of_chunks = attend(FlashAttention(as_documented), case, kind)
    torch.testing.assert_close(out[of_chunks], case.expected(kind)[of_chunks], atol=1e-5, rtol=1e-5)
    assert out[~of_chunks].isnan().all()


def test_what_it_cannot_compute_is_left_to_others() -> None:
    """Soft-caps and sinks."""
    flash = FlashAttention(as_documented)
    assert flash.suits(AttentionKind(0.3, 40, None, None))
    assert not flash.suits(AttentionKind(0.3, None, 5.0, None))
    assert not flash.suits(AttentionKind(0.3, None, None, torch.zeros(9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_is_none_without_a_gpu(dtype: torch.dtype) -> None:
    """And nothing of torch is changed."""
    assert find_flash_attention(torch.device("cpu"), dtype) is None


def missing() -> FlashAttention:
    """As where its package was built for another torch."""
    raise ImportError("undefined symbol")


class Wrong(ReferenceAttention):
    """Attends to something else."""

    def attend(self, *arguments: Any) -> torch.Tensor:
        """See `AttentionBackend`."""
        return super().attend(*arguments).flip(0)


@pytest.mark.parametrize(
    ("find", "reason"),
    [(missing, "undefined symbol"), (lambda: FlashAttention(as_documented), "differ from its own")],
    ids=["broken", "wrong"],
)
def test_an_engine_does_without_it_where_it_does_not_work(
    find: Callable[[], FlashAttention],
    reason: str,
    tiny_models: Callable[[str], tuple[Path, Any]],
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether its package does not load or its numbers are not the model's: it is said, and the engine serves."""
    forgotten: list[bool] = []
    monkeypatch.setattr(torch_engine, "find_flash_attention", lambda _device, _dtype: find())
    monkeypatch.setattr(torch_engine, "forget_flash_attention", lambda: forgotten.append(True))
    monkeypatch.setattr(
        torch_engine, "choose_backend", lambda _, flash=None: Wrong() if flash else ReferenceAttention()
    )
    with capture_logs() as logs:
        make_engine(tiny_models("llama")[0])
    (said,) = [line for line in logs if line["event"] == "no_flash_attention"]
    assert reason in said["reason"]
    assert forgotten == [True]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
def test_on_a_gpu_chunks_get_what_the_reference_path_gives(window: int | None) -> None:
    """The same with FlashAttention 3 itself; needs a Hopper and its package, and has not been run yet."""
    flash = find_flash_attention(torch.device("cuda"), torch.bfloat16)
    if flash is None:
        pytest.skip(
            "FlashAttention 3 is not here: it needs a Hopper, and to be built from source (flash_attn_interface)"
        )
    case = PagedCase(MIXED, KvShape(2, 16, 3, 64, torch.bfloat16), 9)
    kind = AttentionKind(0.125, window, None, None)
    out, of_chunks = attend(flash, case, kind)
    torch.testing.assert_close(out[of_chunks], case.expected(kind)[of_chunks], atol=3e-2, rtol=3e-2)
