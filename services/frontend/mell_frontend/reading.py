"""Reads the sequence streams of one request together; a task per choice only where there are several."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from mell_frontend.generation import Delta, Gateway, GenerationError, SequenceRequest, SequenceStream, Waiting

StreamEvent = Waiting | Delta | GenerationError
"""What a stream gave; an error is an event too, the stream's last."""


class Reader(Protocol):
    """The streams of one request; choices are known by their position."""

    async def next(self) -> list[tuple[int, StreamEvent]]:
        """Return all that is ready, at least one event, waiting for it."""
        ...

    def end(self, choice: int) -> None:
        """Read no more of a choice, and cancel it if it has not ended."""
        ...


@asynccontextmanager
async def open_streams(gateway: Gateway, requests: Sequence[SequenceRequest]) -> AsyncIterator[Reader]:
    """Open a stream for each request; whatever happens inside, all are closed at the end."""
    streams: list[SequenceStream] = []
    try:
        streams.extend(gateway.open(request) for request in requests)
        if len(streams) == 1:
            yield _OneStream(streams[0])
            return
        async with asyncio.TaskGroup() as group:
            reader = _ManyStreams(streams, group)
            try:
                yield reader
            finally:
                reader.close()
    finally:
        for stream in streams:
            stream.close()


async def _next(stream: SequenceStream) -> StreamEvent:
    try:
        return await stream.next()
    except GenerationError as error:
        return error


class _OneStream:
    """The common case, without a task of its own."""

    def __init__(self, stream: SequenceStream) -> None:
        self._stream = stream

    async def next(self) -> list[tuple[int, StreamEvent]]:
        return [(0, await _next(self._stream))]

    def end(self, choice: int) -> None:
        assert choice == 0
        self._stream.close()


class _ManyStreams:
    """A task per stream puts events into one bounded queue; a slow client makes the tasks wait."""

    def __init__(self, streams: Sequence[SequenceStream], group: asyncio.TaskGroup) -> None:
        self._streams = streams
        self._ready: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue(maxsize=len(streams))
        self._pumps = [group.create_task(self._pump(choice)) for choice in range(len(streams))]

    async def next(self) -> list[tuple[int, StreamEvent]]:
        events = [await self._ready.get()]
        while not self._ready.empty():
            events.append(self._ready.get_nowait())
        return events

    def end(self, choice: int) -> None:
        self._pumps[choice].cancel()
        self._streams[choice].close()

    def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()

    async def _pump(self, choice: int) -> None:
        stream = self._streams[choice]
        while True:
            event = await _next(stream)
            await self._ready.put((choice, event))
            if isinstance(event, GenerationError) or (isinstance(event, Delta) and event.finish_reason):
                return
