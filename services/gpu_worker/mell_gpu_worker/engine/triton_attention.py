"""Paged attention by Triton kernels, for decodes and ragged prefill; decides what is launched over which tiles.

A decode's keys are cut at fixed places, every `SPLIT_KEYS`, and the pieces combined: one long sequence fills a card,
and what a row gets depends neither on the rows beside it nor on the grid. A chunk's queries fill it by themselves;
FlashAttention takes them where it is at hand and computes what the layer asks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton

from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.decode_step import DecodeStep
from mell_gpu_worker.engine.flash_attention import FlashAttention, FlashChunks
from mell_gpu_worker.engine.kv_pool import KvShape
from mell_gpu_worker.engine.paged_step import AttentionStep, PagedStep, Span
from mell_gpu_worker.engine.triton_kernels import combine_pieces, paged_attention
from mell_gpu_worker.engine.upload import upload

SPLIT_KEYS = 512
_LEAST_DOT_ROWS = 16
"""`tl.dot` needs at least so many rows."""
_PREFILL_ROWS = 64
_PROGRAMS = 8192
"""About so many share a launch's pieces: plenty for the largest cards, few enough that idle ones cost little."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """One launch: all its tiles hold up to `queries` queries; `table` [rows, blocks] serves them all.

    `pieces` is the most that a tile's keys are cut into, `slots` how many pieces there are in all; both 0: not cut.
    `flash` says how FlashAttention attends for the same rows, if it can.
    """

    queries: int
    tiles: torch.Tensor
    table: torch.Tensor
    pieces: int = 0
    slots: int = 0
    flash: FlashChunks | None = None


class TritonAttention:
    """Launches the kernels: for a step's decodes together, for its prefill chunks together."""

    def __init__(self, flash: FlashAttention | None = None) -> None:
        self._flash = flash
        self._last: tuple[AttentionStep, tuple[_Tiles, ...]] | None = None

    def attend(
        self,
        step: AttentionStep,
        layer: int,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        kind: AttentionKind,
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]; see `AttentionBackend`."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for tiles in self._tiles(step, query.shape[1] // step.pool.shape.kv_heads):
            if self._flash is not None and tiles.flash is not None and self._flash.suits(kind):
                self._flash.attend(tiles.flash, step.pool, layer, (out, query), kind)
            else:
                _launch(tiles, step, layer, (out, query), kind)
        return out

    def _tiles(self, step: AttentionStep, group: int) -> tuple[_Tiles, ...]:
        """Return the step's launches, the same for all its layers."""
        if self._last is None or self._last[0] is not step:
            self._last = step, tuple(_plan(step, group, self._flash))
        return self._last[1]


def _launch(
    tiles: _Tiles, step: AttentionStep, layer: int, io: tuple[torch.Tensor, torch.Tensor], kind: AttentionKind
) -> None:
    out, query = io
    shape, heads = step.pool.shape, query.shape[1]
    keys, values = step.pool.keys(layer), step.pool.values(layer)
    assert query.stride(2) == 1
    # A tile whose keys are one piece needs no second kernel, which would give the same bits.
    split = tiles.pieces > 1
    slots = tiles.slots if split else 0
    partial = torch.empty((slots, heads, shape.head_dim), dtype=torch.float32, device=query.device)
    scales = torch.empty((slots, heads, 2), dtype=torch.float32, device=query.device)
    rows = len(tiles.tiles) * shape.kv_heads
    programs = min(tiles.pieces, max(1, _PROGRAMS // rows)) if split else 1
    sizes = _sizes(shape, kind, heads, SPLIT_KEYS if split else 0)
    paged_attention[(len(tiles.tiles), shape.kv_heads, programs)](
        out,
        query,
        keys,
        values,
        query if kind.sinks is None else kind.sinks,
        partial,
        scales,
        tiles.tiles,
        tiles.table,
        kind.scaling,
        kind.softcap or 0.0,
        *out.stride()[:2],
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        tiles.table.stride(0),
        GROUP=heads // shape.kv_heads,
        TILE_ROWS=max(_LEAST_DOT_ROWS, triton.next_power_of_2(heads // shape.kv_heads * tiles.queries)),
        BLOCK_TOKENS=shape.block_tokens,
        HAS_SOFTCAP=kind.softcap is not None,
        HAS_SINKS=kind.sinks is not None,
        **sizes,
    )
    if split:
        combine_pieces[(len(tiles.tiles), heads)](out, partial, scales, tiles.tiles, *out.stride()[:2], **sizes)


def _sizes(shape: KvShape, kind: AttentionKind, heads: int, split_keys: int) -> dict[str, int]:
    """Return the constants that both kernels are compiled for."""
    return {
        "HEADS": heads,
        "TILE_KEYS": 64 if shape.head_dim <= 128 else 32,
        "SPLIT_KEYS": split_keys,
        "HEAD_DIM": shape.head_dim,
        "PADDED_DIM": max(_LEAST_DOT_ROWS, triton.next_power_of_2(shape.head_dim)),
        "WINDOW": kind.window or 0,
    }


def _plan(step: AttentionStep, group: int, flash: FlashAttention | None) -> Iterator[_Tiles]:
    if isinstance(step, DecodeStep):
        pieces = -(-step.most_tokens // SPLIT_KEYS)
        yield _Tiles(1, step.tiles(pieces), step.table, pieces, pieces * len(step.table))
        return
    assert isinstance(step, PagedStep)
    decodes = [span for span in step.spans if span.count == 1]
    chunks = [span for span in step.spans if span.count > 1]
    if decodes:
        yield _decode_tiles(decodes, step.device)
    if chunks:
        queries = max(1, _PREFILL_ROWS // group)
        tiles = np.array(list(_cut(chunks, queries)), dtype=np.int32)
        table = _table(chunks, step.device)
        laid_out = None if flash is None else flash.lay_out(chunks, table, len(step.slots))
        yield _Tiles(queries, upload(tiles, step.device), table, flash=laid_out)


def _decode_tiles(decodes: list[Span], device: torch.device) -> _Tiles:
    pieces = np.array([-(-span.end // SPLIT_KEYS) for span in decodes])
    slots = np.cumsum(pieces) - pieces
    tiles = np.array([(row, span.first, span.start, 1, slots[row]) for row, span in enumerate(decodes)], dtype=np.int32)
    return _Tiles(1, upload(tiles, device), _table(decodes, device), int(pieces.max()), int(pieces.sum()))


def _cut(chunks: list[Span], queries: int) -> Iterator[tuple[int, ...]]:
    """Cut each span into tiles of up to `queries` queries."""
    for row, span in enumerate(chunks):
        for at in range(0, span.count, queries):
            yield row, span.first + at, span.start + at, min(queries, span.count - at), 0


def _table(spans: list[Span], device: torch.device) -> torch.Tensor:
    table = np.zeros((len(spans), max(len(span.blocks) for span in spans)), dtype=np.int32)
    for row, span in enumerate(spans):
        table[row, : len(span.blocks)] = span.blocks
    return upload(table, device)
