"""Numbers a process's events and writes them beside its work: nothing that emits ever waits for the stream."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mell_shared.events.data import EventData
from mell_shared.events.envelope import enclosed
from mell_shared.events.store import EventRecord, EventStore, EventStoreError, EventTooLargeError

Emit = Callable[[EventData], None]
"""Takes an event; never waits, never fails."""

_BATCH = 128
_RETRY_S = 0.5
_LONGEST_RETRY_S = 8.0
_LAST_WORDS_S = 2.0
_WORTH_A_WARNING = 3
"""Failures in a row: while a stack starts, a frontend may be there before the stream."""


def nowhere(_data: EventData) -> None:
    """Take an event and forget it."""


class _Queued(NamedTuple):
    number: int
    time: datetime
    data: EventData


@dataclass(slots=True)
class OutboxStats:
    """Counts since start."""

    emitted: int = 0
    written: int = 0
    dropped: int = 0
    """For want of room in the queue, or too large for the broker: holes in the numbers."""
    failures: int = 0
    """Attempts to write that came to nothing."""


class Outbox:
    """The events of one source, in order; at most `limit` wait to be written.

    An event that finds no room has its number all the same, so a reader sees what is missing, and `snapshot` tells
    how things stand once events are written again. It is also told every `snapshot_s`, for readers that came late or
    slept longer than events are kept; `None` from it tells nothing.
    """

    def __init__(
        self,
        store: EventStore,
        source: str,
        snapshot: Callable[[], EventData | None],
        *,
        limit: int = 10_000,
        snapshot_s: float = 60.0,
    ) -> None:
        self.stats = OutboxStats()
        self._store = store
        self._source = source
        self._snapshot = snapshot
        self._limit = limit
        self._snapshot_s = snapshot_s
        self._queue: deque[_Queued] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._owes_snapshot = False
        self._failed = 0
        """Attempts in a row."""
        self._log = structlog.get_logger()

    @property
    def queued(self) -> int:
        """How many events wait to be written."""
        return len(self._queue)

    def emit(self, data: EventData) -> None:
        """Give an event its number and queue it, or count it as lost."""
        self.stats.emitted += 1
        if len(self._queue) >= self._limit:
            self.stats.dropped += 1
            self._owes_snapshot = True
            return
        self._queue.append(_Queued(self.stats.emitted, datetime.now(UTC), data))
        self._filled.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tell the state and write while the context lasts, and for up to two seconds after it what is left."""
        self._tell_state()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._write()), group.create_task(self._tell_at_times())]
            try:
                yield
                await self._finish()
            finally:
                for task in tasks:
                    task.cancel()

    async def _finish(self) -> None:
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                while self._queue:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            self._log.warning("events_unwritten", count=len(self._queue), reason="the process stops")

    async def _tell_at_times(self) -> None:
        while True:
            await asyncio.sleep(self._snapshot_s)
            self._tell_state()

    def _tell_state(self) -> None:
        state = self._snapshot()
        if state is not None:
            self.emit(state)

    async def _write(self) -> None:
        while True:
            if not self._queue:
                self._filled.clear()
                self._emptied.set()
                await self._filled.wait()
            await self._write_some()
            if self._owes_snapshot and len(self._queue) < self._limit:
                self._owes_snapshot = False
                self._tell_state()
            if self._failed:
                await asyncio.sleep(min(_LONGEST_RETRY_S, _RETRY_S * 2 ** (self._failed - 1)))

    async def _write_some(self) -> None:
        """Write the first of the queue; what is not surely written is tried again, later."""
        batch = [self._queue[position] for position in range(min(_BATCH, len(self._queue)))]
        reason = "not all were confirmed"
        try:
            written = await self._store.append([self._record(event) for event in batch])
        except EventTooLargeError as error:
            lost = self._queue.popleft()
            self.stats.dropped += 1
            self._log.error("event_too_large", type=lost.data.TYPE, number=lost.number, reason=str(error))
            return
        except EventStoreError as error:
            written, reason = 0, str(error)
        for _ in range(written):
            self._queue.popleft()
        self.stats.written += written
        self._note(reason if written < len(batch) else "")

    def _note(self, trouble: str) -> None:
        if trouble:
            self.stats.failures += 1
            self._failed += 1
            if self._failed == _WORTH_A_WARNING:
                self._log.warning("events_delayed", reason=trouble, queued=len(self._queue))
            return
        if self._failed >= _WORTH_A_WARNING:
            self._log.info("events_written_again", dropped=self.stats.dropped)
        self._failed = 0

    def _record(self, event: _Queued) -> EventRecord:
        cloud_event = enclosed(event.data, self._source, event.number, event.time)
        body = cloud_event.model_dump_json(exclude_none=True).encode()
        return EventRecord(event.data.TYPE, f"{self._source}/{event.number}", body)


class OutboxCollector(Collector):
    """An outbox's counts as metrics."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        stats = self._outbox.stats
        yield CounterMetricFamily("mell_events_emitted", "Events for other systems, numbered.", stats.emitted)
        yield CounterMetricFamily("mell_events_written", "Events that the stream has.", stats.written)
        yield CounterMetricFamily(
            "mell_events_dropped", "Events lost: too many waited, or too large for the broker.", stats.dropped
        )
        yield CounterMetricFamily("mell_events_failures", "Attempts to write events that failed.", stats.failures)
        yield GaugeMetricFamily("mell_events_queued", "Events that wait to be written.", self._outbox.queued)
