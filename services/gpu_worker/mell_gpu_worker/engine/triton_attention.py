"""Paged attention as one Triton kernel for decode and ragged prefill, reading keys and values where they lie.

The online softmax is that of T. Dao et al., "FlashAttention", 2022. All strides are arguments, so that the pool's
layout (all layers of a block together) needs no copy. Heads that share keys are computed together, as rows of one
tile. A row's keys are not split over programs: one long sequence alone does not fill a large card.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.paged_step import PagedStep, Span

_LEAST_DOT_ROWS = 16
"""`tl.dot` needs at least so many rows."""
_PREFILL_ROWS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _paged_attention(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0915, PLR0917 (a kernel is one function)
    out,
    query,
    keys,
    values,
    sinks,
    tiles,
    table,
    scaling,
    softcap,
    out_token_stride,
    out_head_stride,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    table_stride,
    GROUP: tl.constexpr,  # noqa: N803
    TILE_ROWS: tl.constexpr,  # noqa: N803
    TILE_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PADDED_DIM: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    HAS_SINKS: tl.constexpr,  # noqa: N803
):
    """Attend for one tile of queries of one sequence and one KV head.

    `tiles` [tiles, 4]: row of the block table, first packed token, first position, queries. Tile row m is query
    m // GROUP of the tile, head m % GROUP of the KV head's group. WINDOW 0: none.
    """
    tile = tiles + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    table_row = tl.load(tile).to(tl.int64)
    first_token = tl.load(tile + 1).to(tl.int64)
    first_position = tl.load(tile + 2)
    queries = tl.load(tile + 3)

    m = tl.arange(0, TILE_ROWS)
    head = kv_head * GROUP + m % GROUP
    live = (m // GROUP) < queries
    position = first_position + m // GROUP
    d = tl.arange(0, PADDED_DIM)
    inside = d < HEAD_DIM
    token = first_token + m // GROUP
    query_at = query + token[:, None] * query_token_stride + head[:, None] * query_head_stride + d[None, :]
    q = tl.load(query_at, mask=live[:, None] & inside[None, :], other=0.0)

    if HAS_SINKS:
        largest = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
        total = tl.full([TILE_ROWS], 1.0, tl.float32)
    else:
        largest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
    gathered = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)

    end = first_position + queries
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS
    for start in range(begin, end, TILE_KEYS):
        n = start + tl.arange(0, TILE_KEYS)
        present = n < end
        block = tl.load(table + table_row * table_stride + n // BLOCK_TOKENS, mask=present, other=0).to(tl.int64)
        offset = n % BLOCK_TOKENS
        key_at = keys + block * key_block_stride + offset * key_token_stride + kv_head * key_head_stride
        k = tl.load(key_at[None, :] + d[:, None], mask=inside[:, None] & present[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            # tanh(x) = 2 * sigmoid(2 * x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = present[None, :] & (n[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A tile row may have seen nothing yet; -inf minus -inf would be NaN.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        value_at = values + block * value_block_stride + offset * value_token_stride + kv_head * value_head_stride
        v = tl.load(value_at[:, None] + d[None, :], mask=present[:, None] & inside[None, :], other=0.0)
        gathered = gathered * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new_largest

    result = gathered / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = out + token[:, None] * out_token_stride + head[:, None] * out_head_stride + d[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@dataclass(frozen=True, slots=True)
class _Tiles:
    """One launch: all its tiles hold up to `queries` queries; `table` [rows, blocks] serves them all."""

    queries: int
    tiles: torch.Tensor
    table: torch.Tensor


class TritonAttention:
    """Launches the kernel: once for a step's decodes, once for its prefill chunks."""

    def __init__(self) -> None:
        self._last: tuple[PagedStep, tuple[_Tiles, ...]] | None = None

    def attend(
        self,
        step: PagedStep,
        layer: int,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        kind: AttentionKind,
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]; see `AttentionBackend`."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for tiles in self._tiles(step, query.shape[1] // step.pool.shape.kv_heads):
            self._launch(tiles, step, layer, (out, query), kind)
        return out

    def _tiles(self, step: PagedStep, group: int) -> tuple[_Tiles, ...]:
        """Return the step's launches, the same for all its layers."""
        if self._last is None or self._last[0] is not step:
            self._last = step, tuple(_plan(step, group))
        return self._last[1]

    def _launch(
        self,
        tiles: _Tiles,
        step: PagedStep,
        layer: int,
        io: tuple[torch.Tensor, torch.Tensor],
        kind: AttentionKind,
    ) -> None:
        out, query = io
        shape = step.pool.shape
        keys, values = step.pool.keys(layer), step.pool.values(layer)
        assert query.stride(2) == 1
        group = query.shape[1] // shape.kv_heads
        _paged_attention[(len(tiles.tiles), shape.kv_heads)](
            out,
            query,
            keys,
            values,
            query if kind.sinks is None else kind.sinks,
            tiles.tiles,
            tiles.table,
            kind.scaling,
            kind.softcap or 0.0,
            *out.stride()[:2],
            *query.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            tiles.table.stride(0),
            GROUP=group,
            TILE_ROWS=max(_LEAST_DOT_ROWS, triton.next_power_of_2(group * tiles.queries)),
            TILE_KEYS=64 if shape.head_dim <= 128 else 32,
            BLOCK_TOKENS=shape.block_tokens,
            HEAD_DIM=shape.head_dim,
            PADDED_DIM=max(_LEAST_DOT_ROWS, triton.next_power_of_2(shape.head_dim)),
            WINDOW=kind.window or 0,
            HAS_SOFTCAP=kind.softcap is not None,
            HAS_SINKS=kind.sinks is not None,
        )


def _plan(step: PagedStep, group: int) -> Iterator[_Tiles]:
    decodes = [span for span in step.spans if span.count == 1]
    chunks = [span for span in step.spans if span.count > 1]
    if decodes:
        yield _cut(decodes, 1, step.device)
    if chunks:
        yield _cut(chunks, max(1, _PREFILL_ROWS // group), step.device)


def _cut(spans: list[Span], queries: int, device: torch.device) -> _Tiles:
    """Cut each span into tiles of up to `queries` queries."""
    tiles: list[tuple[int, int, int, int]] = []
    table = np.zeros((len(spans), max(len(span.blocks) for span in spans)), dtype=np.int32)
    for row, span in enumerate(spans):
        table[row, : len(span.blocks)] = span.blocks
        for at in range(0, span.count, queries):
            tiles.append((row, span.first + at, span.start + at, min(queries, span.count - at)))  # noqa: PERF401
    packed: Any = torch.tensor(tiles, dtype=torch.int32)
    return _Tiles(queries, packed.to(device), torch.from_numpy(table).to(device))
