"""What every bus does alike: bounded queues to handlers, one task each, and the news that one of them failed.

It knows nothing of brokers. A handler's exception is a bug: it ends the bus, and `watch` (or `close`) raises it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from mell_shared.bus import BusStats, Delivery, Handler

_MAX_PENDING_BYTES = 128 * 2**20


class Consumer:
    """One subscription's queue and the task that hands its deliveries to the handler, one after another."""

    def __init__(self, handler: Handler, max_pending: int, stats: BusStats) -> None:
        self._handler = handler
        self._queue: asyncio.Queue[Delivery] = asyncio.Queue(max_pending)
        self._pending_bytes = 0
        self._stats = stats
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self, own: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        """Begin to hand over, in a task that `own` makes and watches."""
        self._task = own(self._run())

    def stop(self) -> None:
        """Hand nothing more over; what waits is dropped. A handler may stop its own consumer."""
        self._stopped = True
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def offer(self, delivery: Delivery) -> None:
        """Queue `delivery`; if the queue is full, in messages or bytes, drop it and count it."""
        size_bytes = len(delivery.data)
        if self._queue.full() or self._pending_bytes + size_bytes > _MAX_PENDING_BYTES:
            self._stats.dropped += 1
            return
        self._pending_bytes += size_bytes
        self._queue.put_nowait(delivery)

    async def _run(self) -> None:
        while not self._stopped:
            delivery = await self._queue.get()
            self._pending_bytes -= len(delivery.data)
            await self._handler(delivery)


class Deliveries:
    """The consumers and reconnection callbacks of one bus, and how the bus ended."""

    def __init__(self) -> None:
        self.stats = BusStats()
        self._tasks: set[asyncio.Task[None]] = set()
        self._callbacks: list[Callable[[], None]] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._told = False

    @property
    def ended(self) -> bool:
        """Whether the bus was closed or has failed."""
        return self._ended.done()

    def consume(self, handler: Handler, max_pending: int) -> Consumer:
        """Return a started consumer."""
        assert max_pending > 0, "a subscription needs a bound"
        consumer = Consumer(handler, max_pending, self.stats)
        consumer.start(self._own)
        return consumer

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` at each `reconnected`."""
        self._callbacks.append(callback)

    def reconnected(self) -> None:
        """Count a reconnection and call the callbacks, in a task so that a broken one is noticed like a handler."""
        self.stats.reconnections += 1
        self._own(self._call_back())

    def fail(self, error: BaseException) -> None:
        """End the bus with `error`; only the first counts."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def watch(self) -> None:
        """Return when the bus is closed; raise what ended it before."""
        await asyncio.wait({self._ended})
        self._told = True
        self._ended.result()

    async def close(self) -> None:
        """Stop all consumers; raise a failure that nobody was told of."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._ended.done():
            self._ended.set_result(None)
        elif not self._told:
            self._told = True
            self._ended.result()

    async def _call_back(self) -> None:
        for callback in self._callbacks:
            callback()

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
