"""How often a stream asks a server that is not there, in virtual time."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

from mell_gpu_worker.engine.vllm.server import Server
from mell_gpu_worker.engine.vllm.stream import Stream, Streaming
from mell_shared.messages.sampling import SamplingParams
from mell_shared.testing import run_virtually


class Away:
    """A server that nobody finds; counts who tries."""

    def __init__(self) -> None:
        self.asked = 0

    def complete(self, body: dict[str, Any]) -> AbstractAsyncContextManager[Any]:
        """Find nobody."""
        self.asked += 1
        raise TimeoutError


def test_a_server_that_is_away_is_not_besieged() -> None:
    """A stream waits for as long as the server is away, asks once a second in the end, and does not fail."""
    server = Away()

    async def wait_a_minute() -> Stream:
        streaming = Streaming(cast("Server", server), "m", 100, 256, lambda: None)
        stream = Stream([1, 2], 2, SamplingParams(seed=0, max_tokens=5), [1, 2], 2)
        streaming.open(stream)
        await asyncio.sleep(60)
        streaming.check()
        assert stream.task is not None
        assert not stream.task.done()
        streaming.close(stream)
        return stream

    assert not run_virtually(wait_a_minute()).ready
    assert 60 <= server.asked <= 63
