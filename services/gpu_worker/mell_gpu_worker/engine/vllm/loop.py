"""An event loop on a thread of its own, on which the connections to a vLLM server live."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads. A daemon: it never keeps a process from ending."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mell-vllm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Return what `work` returns, or raise what it raises; `TimeoutError` cancels it."""
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._loop)
        return future.result()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Let `function` be called on the loop soon."""
        self._loop.call_soon_threadsafe(function, *arguments)

    @property
    def alive(self) -> bool:
        """Whether it has not been closed."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the loop and the thread; what still runs there is cancelled first."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
