"""The embedded broker of one run: watched, and started again on the same port when it dies."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from mell_console.up.backoff import next_delay_us
from mell_console.up.exits import exited
from mell_console.up.service import Notice
from mell_shared.clock import Clock
from mell_shared.nats_server import NatsServer, NatsServerError
from mell_shared.process import StartError

_NAME = "nats"


class Broker:
    """A `NatsServer` that `run` keeps alive. Services reconnect by themselves, so they outlive its death."""

    def __init__(self, folder: Path, notify: Callable[[Notice], None], clock: Clock) -> None:
        self._server = NatsServer(folder)
        self._notify = notify
        self._clock = clock
        self._stopping = asyncio.Event()

    @property
    def url(self) -> str:
        """Where services connect, password included."""
        return self._server.url

    def start(self) -> None:
        """Start the server and return when it takes connections, in milliseconds; raises `StartError`."""
        try:
            self._server.start()
        except NatsServerError as error:
            raise StartError(str(error)) from error

    async def run(self) -> None:
        """Start the server again whenever it dies, until `stop`."""
        delay_us = 0
        while True:
            started_us = self._clock.now_us()
            await self._ended_or_stopping()
            if self._stopping.is_set():
                return
            delay_us = next_delay_us(delay_us, self._clock.now_us() - started_us)
            self._notify(Notice(_NAME, f"died; starting it again in {delay_us / 1e6:g} s", "error"))
            self._server.kill()
            while not await self._restarted(delay_us):
                delay_us = next_delay_us(delay_us, 0)

    def stop(self) -> None:
        """Stop the server; safe to repeat."""
        self._stopping.set()
        self._server.stop()

    async def _restarted(self, delay_us: int) -> bool:
        """Wait, then try; True also if it is no longer wanted."""
        try:
            await asyncio.wait_for(self._stopping.wait(), delay_us / 1e6)
        except TimeoutError:
            try:
                self._server.start()
            except NatsServerError as error:
                self._notify(Notice(_NAME, str(error), "error"))
                return False
            self._notify(Notice(_NAME, "is ready again", "info"))
        return True

    async def _ended_or_stopping(self) -> None:
        waits = [asyncio.create_task(exited(self._server.pid)), asyncio.create_task(self._wait_for_stop())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _wait_for_stop(self) -> None:
        await self._stopping.wait()
