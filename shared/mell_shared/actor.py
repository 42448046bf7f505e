"""The loop around a core: a bounded mailbox, one item after another, and the one place that catches everything."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

import structlog

Item = TypeVar("Item")

_ITEMS_A_TURN = 32
"""After so many items other tasks get the event loop, also if no handler ever waits."""
STOOD_STILL_S = 1.0
"""A tick so late says that the process, or its whole machine, stood still: what others said meanwhile is unread."""


class Actor(Generic[Item]):
    """Hands items to `handle`, one at a time and in order, so that the core behind it needs no locks.

    `post` and `put` fill the mailbox from anywhere on the loop; `spawn` and `every` make tasks that live as long as
    `run`. What `handle` or such a task raises is a bug: it is logged and leaves `run`, which ends the process.
    """

    def __init__(self, name: str, handle: Callable[[Item], Awaitable[None]], *, max_items: int = 65_536) -> None:
        assert max_items > 0, "a mailbox needs a bound"
        self._name = name
        self._handle = handle
        self._max_items = max_items
        self._items: deque[Item] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.dropped = 0

    def post(self, item: Item) -> bool:
        """Queue `item`; if the mailbox is full drop it, count it in `dropped` and return False."""
        if len(self._items) >= self._max_items:
            self.dropped += 1
            return False
        self.post_anyway(item)
        return True

    def post_anyway(self, item: Item) -> None:
        """Queue `item` also beyond the bound; for the few that come seldom and must not be lost."""
        self._items.append(item)
        self._filled.set()

    async def put(self, item: Item) -> None:
        """Queue `item`, waiting for room; for bus handlers, whose own bounded queue then fills instead."""
        while len(self._items) >= self._max_items:
            self._emptied.clear()
            await self._emptied.wait()
        self.post(item)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Run `work` beside the loop; it is cancelled when the actor stops, and not begun once it has stopped.

        The task is the caller's to cancel early; None if the actor has stopped.
        """
        if self._group is None:
            assert self._stopping, "the actor runs"
            work.close()
            return None
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def every(
        self, interval_s: float, make: Callable[[], Item], after_standstill: Callable[[], Item] | None = None
    ) -> None:
        """Post what `make` returns now and after each interval; a full mailbox misses it.

        Before the first after the process stood still for over a second comes what `after_standstill` returns.
        """
        self.spawn(self._tick(interval_s, make, after_standstill))

    def stop(self) -> None:
        """End `run` after the items that wait now; safe to repeat."""
        self._stopping = True
        self._filled.set()

    async def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Call `started` (which may spawn), then handle items until `stop`; logs and raises what was raised."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                started()
                await self._consume()
                for task in self._tasks:
                    task.cancel()
        except Exception:
            structlog.get_logger().exception("actor_failed", actor=self._name)
            raise
        finally:
            self._group = None

    async def _consume(self) -> None:
        while not (self._stopping and not self._items):
            for _ in range(min(len(self._items), _ITEMS_A_TURN)):
                await self._handle(self._items.popleft())
                self._emptied.set()
            if self._items:
                await asyncio.sleep(0)
            elif not self._stopping:
                self._filled.clear()
                await self._filled.wait()

    async def _tick(
        self, interval_s: float, make: Callable[[], Item], after_standstill: Callable[[], Item] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            if after_standstill is not None and loop.time() - next_s > STOOD_STILL_S:
                self.post(after_standstill())
            self.post(make())
            # After a stall the missed ticks are left out: they would all say the same.
            next_s = max(next_s + interval_s, loop.time())
            await asyncio.sleep(next_s - loop.time())
