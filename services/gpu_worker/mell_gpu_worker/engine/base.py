"""The engine port: what stands behind a worker. The worker's service calls it, from one thread at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mell_gpu_worker.core.step import StepResult, StepRow
from mell_shared.messages.base import MigrationMode


class EngineError(Exception):
    """The engine cannot serve what was asked; the message names the reason and what to do instead."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is, fixed once it is built.

    `kv_layout` is a digest of all that makes two KV pools interchangeable: model, revision, dtype, block size,
    layers, heads. `eos_token_ids` end a sequence unless its parameters say otherwise. A step of an `instant`
    engine takes less time than handing it to another thread would. `migration_modes` are the ways in which its
    sequences can be moved: `kv` and `hybrid` only if `kv_block` shows its memory.
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
    migration_modes: tuple[MigrationMode, ...] = ("tokens",)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token's KV takes, over all layers."""
        return self.block_bytes // self.block_tokens


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

    def kv_block(self, index: int) -> Any:
        """Return the memory of one KV block, `spec.block_bytes` bytes, writable and without a copy.

        A buffer, or an object with `__cuda_array_interface__`. What finished steps wrote is in it, what is written to
        it is there for the next step. Called from any thread, also while `execute` runs over other blocks; valid
        until `close`. Engines whose modes have no `kv` need not have it.
        """
        ...

    def scratch(self, size_bytes: int) -> Any:
        """Return new memory of the kind that `kv_block` returns, to measure with; whoever holds it keeps it alive."""
        ...

    def close(self) -> None:
        """Free the pool and the weights; safe to repeat."""
        ...
