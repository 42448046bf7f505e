"""The check at load: two sequences packed through our path must have the logits the model gives each alone."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.attention import ATTENTION_NAME
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.kv_pool import KvPool, KvShape
from mell_gpu_worker.engine.runner import StepRunner

_LENGTHS = (43, 21)
_CHUNKS = ((0, 29), (29, 13), (42, 1)), ((0, 16), (16, 4), (20, 1))
"""Per sequence (start, count): a prefill, a chunk that continues it, a decode, unequal so that every kind mixes."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest root mean square difference as a share of the logits' own spread; other requests' keys give near 1."""


MakeRunner = Callable[[KvPool], StepRunner]


class ModelCheck:
    """Holds the model's own logits, each sequence alone; whatever is to serve must give them too."""

    def __init__(self, model: Any, device: torch.device) -> None:
        vocab = model.get_input_embeddings().num_embeddings
        self._device = device
        self._sequences = [_ids(length, vocab, seed) for seed, length in enumerate(_LENGTHS)]
        self._own = [_alone(model, ids, device) for ids in self._sequences]

    def require_equal(self, make_runner: MakeRunner, shape: KvShape) -> None:
        """Raise `EngineError` unless a runner gives the model's own logits on packed, chunked sequences."""
        ours = _through_pool(make_runner, shape, self._device, self._sequences)
        for logits, own in zip(ours, self._own, strict=True):
            error = _relative_error(logits, own)
            if not error <= _TOLERANCE[shape.dtype]:
                raise EngineError(
                    f"the model's logits through paged attention differ from its own (by {error:.2g} of their "
                    f"spread): the torch engine does not run it"
                )


def _ids(length: int, vocab: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (length,), generator=generator).tolist()


def _through_pool(
    make_runner: MakeRunner, shape: KvShape, device: torch.device, sequences: list[list[int]]
) -> list[torch.Tensor]:
    blocks = [-(-len(ids) // shape.block_tokens) for ids in sequences]
    order = list(range(sum(blocks)))[::-1]
    tables = [order[: blocks[0]], order[blocks[0] :]]
    runner = make_runner(KvPool(len(order), shape, device))
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    for rows in _steps(sequences, tables):
        logits = runner.run(rows, range(sum(row.count for row in rows)))
        for part, piece in zip(parts, torch.split(logits, [row.count for row in rows]), strict=True):
            part.append(piece)
    return [torch.cat(part) for part in parts]


def _steps(sequences: list[list[int]], tables: list[list[int]]) -> Iterator[list[StepRow]]:
    for chunks in zip(*_CHUNKS, strict=True):
        yield [
            StepRow("check", ids, len(ids), start, count, table, None)
            for ids, table, (start, count) in zip(sequences, tables, chunks, strict=True)
        ]


def _alone(model: Any, ids: list[int], device: torch.device) -> torch.Tensor:
    model.set_attn_implementation("eager")
    try:
        logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return logits.float()


def _relative_error(ours: torch.Tensor, own: torch.Tensor) -> float:
    if ours.shape != own.shape:
        return float("inf")
    spread = own - own.mean(-1, keepdim=True)
    return float((ours - own).square().mean().sqrt() / spread.square().mean().sqrt())
