"""Paged attention in plain torch, everywhere: gather keys and values from the pool, then attend densely."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.kv_pool import KvPool
from mell_gpu_worker.engine.paged_step import AttentionStep, Fresh, Gather

Pair = tuple[torch.Tensor, torch.Tensor]


class ReferenceAttention:
    """Attends row group by row group; keeps one buffer for gathered KV so that it stays in the cache."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def attend(
        self, step: AttentionStep, layer: int, query: torch.Tensor, fresh: Pair, kind: AttentionKind
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]; see `AttentionBackend`."""
        out: torch.Tensor | None = None
        for part in step.plan(kind.window):
            if isinstance(part, Fresh):
                index: slice | torch.Tensor | None = slice(part.first, part.first + part.count)
                attended = self._fresh(part, query, fresh, kind)
            else:
                index = part.packed
                attended = self._gathered(step.pool, part, layer, query, kind)
            if index is None:
                return attended
            out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
            out[index] = attended
        assert out is not None
        return out

    def _fresh(self, part: Fresh, query: torch.Tensor, fresh: Pair, kind: AttentionKind) -> torch.Tensor:
        rows = slice(part.first, part.first + part.count)
        q, k, v = (t[rows].transpose(0, 1)[None] for t in (query, *fresh))
        return dense_attention(q, (k, v), part.mask, kind)[0].transpose(0, 1)

    def _gathered(
        self, pool: KvPool, part: Gather, layer: int, query: torch.Tensor, kind: AttentionKind
    ) -> torch.Tensor:
        rows = query if part.packed is None else query[part.packed]
        q = rows.view(part.rows, part.count, *rows.shape[1:]).transpose(1, 2)
        pages = part.pages + 2 * layer
        k, v = self._read(pool, "keys", pages, part), self._read(pool, "values", pages + 1, part)
        return dense_attention(q, (k, v), part.mask, kind).transpose(1, 2).reshape(rows.shape)

    def _read(self, pool: KvPool, name: str, pages: torch.Tensor, part: Gather) -> torch.Tensor:
        """Return [rows, kv_heads, positions, head_dim] gathered into our buffer."""
        shape = pool.shape
        needed = len(pages) * shape.page_elements
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < needed or buffer.dtype != shape.dtype:
            buffer = self._buffers[name] = pool.data.new_empty(needed)
        out = buffer[:needed].view(len(pages), shape.page_elements)
        torch.index_select(pool.pages, 0, pages, out=out)
        return out.view(part.rows, -1, shape.kv_heads, shape.head_dim).transpose(1, 2)


def dense_attention(query: torch.Tensor, pair: Pair, mask: torch.Tensor | None, kind: AttentionKind) -> torch.Tensor:
    """Return [batch, heads, count, head_dim]; `mask` [batch or 1, 1, count, keys] is added, None means causal.

    `query` [batch, heads, count, head_dim], keys and values [batch, kv_heads, keys, head_dim].
    """
    if kind.softcap is None and kind.sinks is None:
        return _fused(query, pair, mask, kind.scaling)
    return _explicit(query, pair, mask, kind)


def _fused(query: torch.Tensor, pair: Pair, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    batch, heads, count, size = query.shape
    key, value = pair
    if count > 1:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != key.shape[1]
        )
    # One query a row: the heads that share keys become its queries, so that keys are read once.
    packed = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    return scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling).reshape(query.shape)


def _explicit(query: torch.Tensor, pair: Pair, mask: torch.Tensor | None, kind: AttentionKind) -> torch.Tensor:
    batch, heads, count, size = query.shape
    key, value = pair
    grouped = query.reshape(batch, key.shape[1], -1, size)
    scores = (grouped @ key.transpose(2, 3)).float().view(batch, heads, count, -1) * kind.scaling
    if kind.softcap is not None:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    if mask is None:
        mask = torch.full((count, count), float("-inf"), device=query.device).triu_(1)
    weights = _softmax(scores + mask, kind.sinks).to(value.dtype)
    return (weights.view(batch, key.shape[1], -1, key.shape[2]) @ value).view(query.shape)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
