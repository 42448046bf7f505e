"""Runs a model over packed rows: builds its inputs, calls it once, returns the logits that were asked for."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.attention import AttentionBackend, PagedCall
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.kv_pool import KvPool
from mell_gpu_worker.engine.paged_step import PagedStep
from mell_gpu_worker.engine.upload import upload


class StepRunner(Protocol):
    """Computes steps over the pool it was made for."""

    def run(self, rows: Sequence[StepRow], kept: Sequence[int]) -> torch.Tensor:
        """Write the rows' KV and return float32 logits [kept, vocab] at the packed token indices `kept`.

        The KV of every token is written even if nothing is kept. Raises `EngineError`.
        """
        ...


class Runner:
    """transformers' model over one pool; keeps nothing between steps."""

    def __init__(self, model: Any, pool: KvPool, backend: AttentionBackend) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend

    def run(self, rows: Sequence[StepRow], kept: Sequence[int]) -> torch.Tensor:
        """Run one step; see `StepRunner`."""
        step = PagedStep(self._pool, rows, self._pool.shape.dtype)
        step.clear_new_tails()
        device = self._pool.data.device
        ids = chain.from_iterable(row.token_ids[row.start : row.start + row.count] for row in rows)
        positions = chain.from_iterable(range(row.start, row.start + row.count) for row in rows)
        logits = call_model(
            self._model,
            PagedCall(step, self._backend),
            upload(torch.tensor(list(ids)), device),
            upload(torch.tensor(list(positions)), device),
            upload(torch.tensor(list(kept) or [0]), device),
        )
        return logits[: len(kept)].float()


def call_model(
    model: Any, paged: PagedCall, ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Return the logits [kept, vocab] of packed tokens, their `ids` and `positions` [tokens]. Raises `EngineError`."""
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=kept, paged=paged)
    layers = paged.step.pool.shape.layers
    if paged.step.layers_attended != layers:
        raise EngineError(
            f"{paged.step.layers_attended} of the model's {layers} layers use our attention: "
            f"the torch engine does not run it"
        )
    logits: torch.Tensor = output.logits[0]
    return logits


def last_tokens(rows: Sequence[StepRow]) -> list[int]:
    """Return the packed index of each row's last token."""
    ends: list[int] = []
    for row in rows:
        ends.append((ends[-1] if ends else -1) + row.count)
    return ends
