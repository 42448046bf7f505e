"""FlashAttention 3 for prefill, through torch's `varlen_attn`: where its package is, on Hopper, in half precision."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mell_gpu_worker.engine.attention import AttentionKind
from mell_gpu_worker.engine.kv_pool import KvPool
from mell_gpu_worker.engine.paged_step import Span
from mell_gpu_worker.engine.upload import upload

_NAME, _PACKAGE, _HOPPER = "FA3", "flash_attn_interface", 9


@dataclass(frozen=True, slots=True)
class FlashChunks:
    """The chunks of one step as `varlen_attn` wants them, the same for all its layers.

    `tokens` [queries] are their places in the packed input (None: all of it, in order), `ends` [chunks + 1] where each
    one's queries end, `seen` [chunks] how many positions it has in the pool, its own included, `table` [chunks, blocks]
    where; int32 but for `tokens`.
    """

    tokens: torch.Tensor | None
    ends: torch.Tensor
    seen: torch.Tensor
    table: torch.Tensor
    most_queries: int
    most_seen: int


class FlashAttention:
    """Attends for chunks of prompts, which read keys and values where they lie.

    One pass over a chunk's keys, so that what it gets does not depend on the chunks beside it. That leaves much of a
    card idle where a row has one query: decodes are not for it.
    """

    def __init__(self, varlen_attn: Callable[..., Any]) -> None:
        """`varlen_attn` is torch's."""
        self._varlen_attn = varlen_attn

    def suits(self, kind: AttentionKind) -> bool:
        """Whether it computes this kind of attention."""
        return kind.softcap is None and kind.sinks is None

    def lay_out(self, chunks: Sequence[Span], table: torch.Tensor, tokens: int) -> FlashChunks:
        """Return how to attend for the chunks of a step of so many tokens; `table` is as in `FlashChunks`."""
        counts, seen = (np.array([getattr(span, name) for span in chunks], dtype=np.int32) for name in ("count", "end"))
        places = np.concatenate([np.arange(span.first, span.first + span.count) for span in chunks])
        return FlashChunks(
            None if len(places) == tokens else upload(places, table.device),
            upload(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), table.device),
            upload(seen, table.device),
            table,
            int(counts.max()),
            int(seen.max()),
        )

    def attend(
        self, chunks: FlashChunks, pool: KvPool, layer: int, io: tuple[torch.Tensor, torch.Tensor], kind: AttentionKind
    ) -> None:
        """Write the chunks' rows of the output, given the queries; both [tokens, heads, head_dim]."""
        out, query = io
        found = self._varlen_attn(
            query if chunks.tokens is None else query.index_select(0, chunks.tokens),
            pool.keys(layer),
            pool.values(layer),
            chunks.ends,
            None,
            chunks.most_queries,
            chunks.most_seen,
            scale=kind.scaling,
            # Positions to the left that are seen beside a query's own, and to the right.
            window_size=(-1 if kind.window is None else kind.window - 1, 0),
            enable_gqa=True,
            seqused_k=chunks.seen,
            block_table=chunks.table,
            num_splits=1,
        )
        if chunks.tokens is None:
            out.copy_(found)
        else:
            out.index_copy_(0, chunks.tokens, found)


def find_flash_attention(device: torch.device, dtype: torch.dtype) -> FlashAttention | None:
    """Return it where the machine has it; raises whatever its package or a torch too old for it raises."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.cuda.get_device_capability(device)[0] != _HOPPER or importlib.util.find_spec(_PACKAGE) is None:
        return None
    # Younger than the oldest torch that the engine runs with.
    from torch.nn.attention import activate_flash_attention_impl  # noqa: PLC0415
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    activate_flash_attention_impl(_NAME)
    return FlashAttention(varlen_attn)


def forget_flash_attention() -> None:
    """Let torch's own attention have its usual kernels again."""
    with suppress(ImportError):
        from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl  # noqa: PLC0415

        if current_flash_attention_impl() == _NAME:
            restore_flash_attention_impl()
