"""The engine port: what stands behind a worker. The worker's service calls it, from one thread at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mell_gpu_worker.core.capabilities import Capabilities
from mell_gpu_worker.core.events import PoolMeasured
from mell_gpu_worker.core.step import StepResult, StepRow
from mell_shared.messages.base import MigrationMode


class EngineError(Exception):
    """The engine cannot serve what was asked; the message names the reason and what to do instead."""


class EngineAwayError(Exception):
    """The engine cannot be reached now, which may pass; the message says what was tried."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is, fixed once it is built.

    `kv_layout` is a digest of all that makes two KV pools interchangeable: model, revision, dtype, block size,
    layers, heads. `eos_token_ids` end a sequence unless its parameters say otherwise. A step of an `instant`
    engine takes less time than handing it to another thread would. `migration_modes` are the ways in which its
    sequences can be moved: `kv` and `hybrid` only if `kv_block` shows its memory, `kv` also if engines fetch KV from
    one another (`can.kv`): `kv_source` is then where others find that of this one.
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
    kv_source: str = ""
    can: Capabilities = field(default_factory=Capabilities)

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


@runtime_checkable
class PacedEngine(Engine, Protocol):
    """An engine with a pace and a memory of its own: it goes on with what it was given also between steps.

    For it a step is a look: it returns as soon as some row has something, or somebody wakes it, and says which rows
    are pending. A sequence that is in no row of a step is wanted no more. `token_ids` of a row is one and the same list
    for as long as its sequence goes on as it was.
    """

    def measure(self) -> PoolMeasured:
        """Say how its memory stands. Raises `EngineAwayError` if it cannot be reached, and has not been for a while.

        Called each second or so, from any thread, also while `execute` runs. Raises `EngineError` as `execute` does.
        """
        ...

    def wake(self) -> None:
        """End the look under way, or the next one: something else has happened. Called from any thread."""
        ...

    def rest(self) -> None:
        """Drop all that goes on for anybody: nobody runs. Called like `execute`."""
        ...
