"""One HTTP request while it is answered: its connection, watched for a client that leaves or stops reading."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from mell_frontend.asgi import Receive, Send, send_events, send_json, start_event_stream, wait_for_disconnect
from mell_frontend.record import RequestRecord


class Exchange:
    """Sends one answer; `run` ends the work as soon as nobody can get it any more.

    A client is given up that has closed its connection, or has let one write wait for `write_timeout_s`. `send_body`
    is the server's own `send`, for the events of a response that has begun.
    """

    def __init__(
        self, receive: Receive, send: Send, send_body: Send, record: RequestRecord, write_timeout_s: float
    ) -> None:
        self._receive = receive
        self._send = send
        self._send_body = send_body
        self._write_timeout_s = write_timeout_s
        self._loop = asyncio.get_running_loop()
        self._writing_since_s: float | None = None
        self._answered = False
        self.record = record
        self.started = False

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` until it is done, or cancel it, which closes its streams at once."""
        async with asyncio.TaskGroup() as group:
            working = group.create_task(work)
            helpers = [
                group.create_task(self._cancel_when_gone(working)),
                group.create_task(self._cancel_when_stuck(working)),
            ]
            await asyncio.wait([working])
            for helper in helpers:
                helper.cancel()
        self.record.disconnected = working.cancelled()

    async def _cancel_when_gone(self, working: asyncio.Task[None]) -> None:
        await wait_for_disconnect(self._receive)
        # The response's own end looks like a disconnect too.
        if not self._answered:
            working.cancel()

    async def _cancel_when_stuck(self, working: asyncio.Task[None]) -> None:
        while not self._stuck(self._loop.time()):  # noqa: ASYNC110 - nothing happens that could be waited for
            await asyncio.sleep(self._write_timeout_s / 2)
        working.cancel()

    def _stuck(self, now_s: float) -> bool:
        return self._writing_since_s is not None and now_s - self._writing_since_s >= self._write_timeout_s

    async def start(self) -> None:
        """Begin a response of server-sent events."""
        self.started = True
        await self._write(start_event_stream(self._send))

    async def events(self, text: str, *, last: bool) -> None:
        """Send events in one write."""
        self._answered = last
        # Past the layers of the framework, which have nothing to do with bodies and would cost as much as the write.
        await self._write(send_events(self._send_body, text, more=not last))

    async def body(self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Send the whole response."""
        self.started = self._answered = True
        await self._write(send_json(self._send, status, body, headers))

    async def _write(self, sending: Coroutine[Any, Any, None]) -> None:
        self._writing_since_s = self._loop.time()
        await sending
        self._writing_since_s = None
