"""Prefill at a vLLM server: a completion of one token, after which its prefix cache holds the ids.

Computed there, or fetched from another server, if both have a connector for that.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mell_gpu_worker.core.step import Fetched
from mell_gpu_worker.engine.vllm.api import read_fetched, warm_up_request
from mell_gpu_worker.engine.vllm.server import UNREACHABLE, Server, ServerFacts, json_of


@dataclass(slots=True, eq=False)
class WarmUp:
    """The first `tokens` tokens of a sequence on their way into the cache; `ready` once they are or cannot be.

    A cache holds whole blocks only: `ids` are those.
    """

    ids: Sequence[int]
    tokens: int
    opened_s: float
    kv_source: str = ""
    """Where another server's connector may have them."""
    fetched: Fetched = field(default_factory=Fetched)
    """From there, and not told to anybody yet; that of older ones for the same sequence, too."""
    ready: bool = False
    task: asyncio.Task[None] | None = None
    closed: bool = False

    @property
    def heard_s(self) -> float:
        """When it was to begin."""
        return self.opened_s


class WarmUps:
    """Runs them against one server, on one event loop."""

    def __init__(self, server: Server, facts: ServerFacts, told: Callable[[], None]) -> None:
        self._server = server
        self._model = facts.model
        self._told = told
        self._block_tokens = facts.cache.block_tokens if facts.cache.prefix_cache else 0

    def begin(self, ids: Sequence[int], tokens: int, kv_source: str, older: WarmUp | None) -> WarmUp:
        """Return one to be opened on the loop; it is ready at once if no block is full that was not in `older`."""
        whole = tokens - tokens % self._block_tokens if self._block_tokens else 0
        known, fetched = (0, Fetched()) if older is None else (len(older.ids), older.fetched)
        return WarmUp(ids[:whole], tokens, time.monotonic(), kv_source, fetched, ready=whole <= known)

    def open(self, warm_up: WarmUp) -> None:
        """Begin; to be called on the loop."""
        if not warm_up.closed and not warm_up.ready:
            warm_up.task = asyncio.get_running_loop().create_task(self._run(warm_up))

    def close(self, warm_up: WarmUp) -> None:
        """End, at the server too; to be called on the loop, safe to repeat."""
        warm_up.closed = True
        if warm_up.task is not None:
            warm_up.task.cancel()

    async def _run(self, warm_up: WarmUp) -> None:
        try:
            body = warm_up_request(self._model, warm_up.ids, warm_up.kv_source)
            async with self._server.complete(body) as response:
                warm_up.fetched = warm_up.fetched.plus(read_fetched(await json_of(response)))
        except UNREACHABLE:
            # Then the sequence is computed when it runs; nothing is lost but time.
            pass
        finally:
            warm_up.ready = True
            self._told()
