"""The scaler's shell: asks the frontend how things stand once a second, and carries out what the core says."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from pydantic import TypeAdapter

from mell_console.admin.ask import AdminError, Frontend, segment
from mell_console.scaler.core import ScalerCore
from mell_console.scaler.values import (
    Command,
    DrainWorker,
    StartWorkers,
    StopWorker,
    Tell,
    UndrainWorker,
    seen_of,
)
from mell_shared.clock import Clock
from mell_shared.messages.admin import STATUS, DrainReply

_INTERVAL_S = 1.0
_DRAIN: TypeAdapter[DrainReply] = TypeAdapter(DrainReply)


class ScaleError(Exception):
    """Workers could not be started or stopped; the message is one line. `failed`: how many were not."""

    def __init__(self, message: str, failed: int = 1) -> None:
        super().__init__(message)
        self.failed = failed


class Port(Protocol):
    """What starts and stops workers. Both may take long and raise `ScaleError`; both are safe to repeat."""

    async def start(self, order: StartWorkers) -> None:
        """Bring it to as many workers as ordered; returns when they are, or can be expected to be, there."""
        ...

    async def stop(self, order: StopWorker) -> None:
        """Stop one worker: it is drained and holds nothing."""
        ...


class ScalerLoop:
    """Runs one core against one frontend and one port, on one event loop."""

    def __init__(self, core: ScalerCore, model: str, frontend: Frontend, port: Port, clock: Clock) -> None:
        self._core = core
        self._model = model
        self._frontend = frontend
        self._port = port
        self._clock = clock
        self._orders: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._answered = True

    async def run(self, stop: asyncio.Event, tell: Callable[[Tell], None]) -> None:
        """Scale until `stop` is set; orders under way to the port are then given up."""
        async with asyncio.TaskGroup() as self._orders:
            while not stop.is_set():
                await self._look(tell)
                await _wait(stop, _INTERVAL_S)
            await self._carry_out(self._core.end(self._clock.now_us()), tell)
            for task in self._tasks:
                task.cancel()

    async def _look(self, tell: Callable[[Tell], None]) -> None:
        try:
            seen = seen_of(await asyncio.to_thread(self._frontend.get, "status", STATUS), self._model)
        except (AdminError, ValueError) as error:
            if self._answered:
                tell(Tell(f"nothing is changed while the state is not known: {error}", "warning"))
            self._answered = False
            return
        if not self._answered:
            tell(Tell("the state is known again"))
        self._answered = True
        await self._carry_out(self._core.observe(seen, self._clock.now_us()), tell)

    async def _carry_out(self, commands: list[Command], tell: Callable[[Tell], None]) -> None:
        for command in commands:
            match command:
                case Tell():
                    tell(command)
                case DrainWorker(worker):
                    await self._order(f"workers/{segment(worker)}/drain", tell)
                case UndrainWorker(worker):
                    await self._order(f"workers/{segment(worker)}/undrain", tell)
                case StartWorkers():
                    self._spawn(self._start(command, tell))
                case StopWorker():
                    self._spawn(self._stop(command, tell))

    async def _order(self, path: str, tell: Callable[[Tell], None]) -> None:
        """Order by `/admin`; one that is lost is repeated by the core, which looks for its effect."""
        try:
            await asyncio.to_thread(self._frontend.post, path, {}, _DRAIN)
        except AdminError as error:
            tell(Tell(f"{path}: {error}", "warning"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._orders is not None, "it runs"
        task = self._orders.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, order: StartWorkers, tell: Callable[[Tell], None]) -> None:
        failed, why = 0, ""
        try:
            await self._port.start(order)
        except ScaleError as error:
            failed, why = error.failed, str(error)
        await self._carry_out(self._core.start_ended(failed, why, self._clock.now_us()), tell)

    async def _stop(self, order: StopWorker, tell: Callable[[Tell], None]) -> None:
        why = ""
        try:
            await self._port.stop(order)
        except ScaleError as error:
            why = str(error)
        await self._carry_out(self._core.stop_ended(why, self._clock.now_us()), tell)


async def _wait(stop: asyncio.Event, longest_s: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), longest_s)
    except TimeoutError:
        return
