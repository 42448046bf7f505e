"""One step's packed tokens: where each row's new KV goes in the pool, and what each row attends to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.kv_pool import KvPool
from mell_gpu_worker.engine.upload import upload

_GATHER_BYTES = 6 << 20
"""Keys and values gathered at once: little enough to be read back from a CPU's cache (measured, 2 to 12 MB)."""
_LEAST_FILL = 0.75
"""Rows share a padded gather only if the shortest fills this share of it."""


@dataclass(frozen=True, slots=True)
class Span:
    """One row in the packed input: tokens [first, first + count) of it are positions [start, start + count)."""

    first: int
    start: int
    count: int
    blocks: NDArray[np.int64]

    @property
    def end(self) -> int:
        """How many tokens of the sequence have KV after the step."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Gather:
    """Rows that attend together over keys gathered from the pool, padded to one length.

    `packed` [rows * count] are the rows' tokens in the packed input (None: all of it, in order), `pages`
    [rows * blocks] the layer-0 key pages, `mask` [rows, 1, count, blocks * block_tokens] is added to the scores.
    """

    rows: int
    count: int
    packed: torch.Tensor | None
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fresh:
    """A row whose whole context is in this step: it attends to the step's own keys, no gather needed."""

    first: int
    count: int
    mask: torch.Tensor | None
    """[1, 1, count, count], added to the scores; None: plain causal."""


Plan = tuple[Gather | Fresh, ...]


class AttentionStep(Protocol):
    """A step as a model's attention layers see it; `layers_attended` counts those that did."""

    pool: KvPool
    layers_attended: int

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one layer's new keys and values, each [tokens, kv_heads, head_dim], to the pool."""
        ...

    def plan(self, window: int | None) -> Plan:
        """Return how the step's rows attend under a sliding window (None: full attention)."""
        ...


class PagedStep:
    """What the attention function needs to know of one step; made anew for each, read by all layers."""

    def __init__(self, pool: KvPool, rows: Sequence[StepRow], dtype: torch.dtype) -> None:
        self.pool = pool
        self.dtype = dtype
        self.device = pool.data.device
        self.spans = list(_spans(rows, pool.shape.block_tokens))
        self.slots = upload(np.concatenate([self._slots(span) for span in self.spans]), self.device)
        self.layers_attended = 0
        self._plans: dict[int | None, Plan] = {}

    def _slots(self, span: Span) -> NDArray[np.int64]:
        """Return the rows of `pool.tokens` that take the span's layer-0 keys."""
        shape = self.pool.shape
        positions = np.arange(span.start, span.end)
        pages = span.blocks[positions // shape.block_tokens] * (shape.layers * 2)
        return pages * shape.block_tokens + positions % shape.block_tokens

    def clear_new_tails(self) -> None:
        """Zero each block that this step begins and does not fill, so that reading past its end finds no NaN."""
        size = self.pool.shape.block_tokens
        self.pool.clear(
            [
                int(span.blocks[span.end // size])
                for span in self.spans
                if span.end % size and span.start <= span.end // size * size
            ]
        )

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one layer's new keys and values, each [tokens, kv_heads, head_dim], to the pool."""
        self.pool.store(self.slots, layer, key, value)

    def plan(self, window: int | None) -> Plan:
        """Return how this step's rows attend under a sliding window (None: full attention)."""
        if window not in self._plans:
            self._plans[window] = tuple(self._make_plan(window))
        return self._plans[window]

    def _make_plan(self, window: int | None) -> Iterator[Gather | Fresh]:
        for span in self.spans:
            if span.count > 1 and span.start == 0:
                yield self._fresh(span, window)
            elif span.count > 1:
                yield self._gather([span], window)
        decodes = sorted((s for s in self.spans if s.count == 1), key=lambda s: self._block_count(s, window))
        for group in self._groups(decodes[::-1], window):
            yield self._gather(group, window)

    def _groups(self, decodes: list[Span], window: int | None) -> Iterator[list[Span]]:
        """Cut rows, longest first, into groups of like length whose gather fits the cache."""
        shape = self.pool.shape
        block_bytes = 2 * shape.page_elements * shape.dtype.itemsize
        group: list[Span] = []
        longest = 0
        for span in decodes:
            blocks = self._block_count(span, window)
            full = (len(group) + 1) * longest * block_bytes > _GATHER_BYTES
            if group and (full or blocks < _LEAST_FILL * longest):
                yield group
                group = []
            if not group:
                longest = blocks
            group.append(span)
        if group:
            yield group

    def _first_block(self, span: Span, window: int | None) -> int:
        """Return the first block that any of the span's tokens can see."""
        return 0 if window is None else max(0, span.start - window + 1) // self.pool.shape.block_tokens

    def _block_count(self, span: Span, window: int | None) -> int:
        return -(-span.end // self.pool.shape.block_tokens) - self._first_block(span, window)

    def _fresh(self, span: Span, window: int | None) -> Fresh:
        if window is None or window >= span.count:
            return Fresh(span.first, span.count, None)
        positions = torch.arange(span.count, device=self.device)
        return Fresh(
            span.first,
            span.count,
            additive_mask(positions[:, None], positions[None, :], window, self.dtype)[None, None],
        )

    def _gather(self, group: list[Span], window: int | None) -> Gather:
        """Plan a padded gather; all spans of the group have equal counts."""
        shape = self.pool.shape
        count, size = group[0].count, shape.block_tokens
        firsts = [self._first_block(span, window) for span in group]
        blocks = max(self._block_count(span, window) for span in group)
        table = np.full((len(group), blocks), self.pool.zero_block, dtype=np.int64)
        for row, (span, first) in enumerate(zip(group, firsts, strict=True)):
            seen = span.blocks[first : -(-span.end // size)]
            table[row, : len(seen)] = seen
        starts = self._column([span.start for span in group])
        queries = starts + torch.arange(count, device=self.device)
        keys = self._column(firsts) * size + torch.arange(blocks * size, device=self.device)
        return Gather(
            rows=len(group),
            count=count,
            packed=self._packed(group, count),
            pages=upload(table.reshape(-1) * (shape.layers * 2), self.device),
            mask=additive_mask(queries[:, :, None], keys[:, None, :], window, self.dtype)[:, None],
        )

    def _packed(self, group: list[Span], count: int) -> torch.Tensor | None:
        firsts = [span.first for span in group]
        if len(group) * count == len(self.slots) and firsts == sorted(firsts):
            return None
        return (self._column(firsts) + torch.arange(count, device=self.device)).reshape(-1)

    def _column(self, values: list[int]) -> torch.Tensor:
        return upload(np.array(values), self.device)[:, None]


def additive_mask(queries: torch.Tensor, keys: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where a query position may see a key position, -inf elsewhere."""
    hidden = keys > queries
    if window is not None:
        hidden = hidden | (keys <= queries - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _spans(rows: Sequence[StepRow], block_tokens: int) -> Iterator[Span]:
    first = 0
    for row in rows:
        used = -(-(row.start + row.count) // block_tokens)
        assert row.count > 0, row.sequence
        assert len(row.block_table) >= used, row.sequence
        yield Span(first, row.start, row.count, np.array(row.block_table[:used], dtype=np.int64))
        first += row.count
