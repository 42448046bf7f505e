"""The engine port: what stands behind a worker. The worker's service calls it, from one thread at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mell_gpu_worker.core.step import StepResult, StepRow


class EngineError(Exception):
    """The engine cannot serve what was asked; the message names the reason and what to do instead."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is, fixed once it is built.

    `kv_layout` is a digest of all that makes two KV pools interchangeable: model, revision, dtype, block size,
    layers, heads. `eos_token_ids` end a sequence unless its parameters say otherwise. A step of an `instant`
    engine takes less time than handing it to another thread would.
    """

    name: str
    device: str
    kv_layout: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_blocks: int
    block_tokens: int
    block_bytes: int
    instant: bool = False


class Engine(Protocol):
    """Runs steps over a paged KV pool of `spec.kv_blocks` blocks that the core's allocator hands out.

    `execute` blocks until the step is done and is deterministic in its rows alone (no state between steps but
    the pool). It may be called from any thread, never from two at once. It raises `EngineError` only for
    what no retry can mend; the worker then leaves the cluster and stops.
    """

    @property
    def spec(self) -> EngineSpec:
        """What this engine is."""
        ...

    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Run one step over `rows` (not empty), writing KV through their block tables."""
        ...

    def check_grammar(self, text: str) -> str | None:
        """Return why the grammar cannot be used, or None; called from any thread, also while `execute` runs."""
        ...

    def close(self) -> None:
        """Free the pool and the weights; safe to repeat."""
        ...
