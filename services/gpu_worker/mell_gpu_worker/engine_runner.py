"""Where the engine runs: one thread of its own, so that the event loop serves commands during a step."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from mell_gpu_worker.core.events import EngineAway, EngineFailed, PoolMeasured, StepFinished
from mell_gpu_worker.core.step import StepResult, StepRow
from mell_gpu_worker.engine.base import Engine, EngineAwayError, EngineError, PacedEngine
from mell_shared.actor import STOOD_STILL_S

T = TypeVar("T")
_THREAD_NAME = "mell-engine"
_Job = tuple[asyncio.Future[Any], Callable[[], Any]]


class _StepTimeoutError(Exception):
    """A step took too long."""


class _Watch:
    """Ends a step that takes too long, by the time in which the process ran."""

    def __init__(self, step: "asyncio.Future[StepResult]", timeout_s: float) -> None:
        self._step = step
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self.timer = self._begin()

    def _begin(self) -> asyncio.TimerHandle:
        due_s = self._loop.time() + self._timeout_s
        return self._loop.call_at(due_s, self._expire, due_s)

    def _expire(self, due_s: float) -> None:
        if self._loop.time() - due_s > STOOD_STILL_S:
            self.timer = self._begin()
        elif not self._step.done():
            self._step.set_exception(_StepTimeoutError())


class EngineThread:
    """A thread that runs one job after another.

    It is a daemon: a process told to stop while weights load, or while a step hangs, does stop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=_THREAD_NAME, daemon=True)
        self._thread.start()

    def begin(self, job: Callable[[], T]) -> "asyncio.Future[T]":
        """Hand `job` to the thread; the future has what it returns or raises. If cancelled, `job` still runs."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((done, job))
        return done

    async def run(self, job: Callable[[], T]) -> T:
        """Return what `job` returns on the thread, or raise what it raises."""
        return await self.begin(job)

    def close(self) -> None:
        """End the thread after the jobs given so far; safe to repeat."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            done, job = entry
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 - carried to whoever waits, not handled
                self._settle(done, done.set_exception, error)
            else:
                self._settle(done, done.set_result, result)

    def _settle(self, done: asyncio.Future[Any], settle: Callable[[Any], None], value: Any) -> None:
        def set_once() -> None:
            if not done.done():
                settle(value)

        try:
            self._loop.call_soon_threadsafe(set_once)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more


def engine_thread_hangs(timeout_s: float = 1.0) -> bool:
    """Whether an engine thread of this process, told to close, is still in the middle of something."""
    threads = [thread for thread in threading.enumerate() if thread.name == _THREAD_NAME]
    for thread in threads:
        thread.join(timeout_s)
    return any(thread.is_alive() for thread in threads)


class EngineRunner:
    """An engine and the thread that its steps run on, unless they are instant.

    A step that takes longer than `step_timeout_s` counts as a failure of the engine; time in which the whole process
    stood still does not.
    """

    def __init__(self, engine: Engine, thread: EngineThread, step_timeout_s: float) -> None:
        self._engine = engine
        self._paced = engine if isinstance(engine, PacedEngine) else None
        self._thread = thread
        self._step_timeout_s = step_timeout_s

    def step(self, rows: Sequence[StepRow]) -> Coroutine[Any, Any, StepFinished | EngineFailed]:
        """Begin one step at once, unless it is an instant one; what is returned waits for what comes of it.

        One at a time.
        """
        if self._engine.spec.instant:
            return self._step_here(rows)
        return self._outcome(self._thread.begin(lambda: self._engine.execute(rows)))

    async def _outcome(self, step: "asyncio.Future[StepResult]") -> StepFinished | EngineFailed:
        watch = _Watch(step, self._step_timeout_s)
        try:
            return StepFinished(await step)
        except EngineError as error:
            return EngineFailed(str(error))
        except _StepTimeoutError:
            return EngineFailed(f"a step took longer than {self._step_timeout_s:g} s (MELL_STEP_TIMEOUT_S)")
        finally:
            watch.timer.cancel()

    async def _step_here(self, rows: Sequence[StepRow]) -> StepFinished | EngineFailed:
        try:
            result = self._engine.execute(rows)
        except EngineError as error:
            return EngineFailed(str(error))
        # Whoever waits for the event loop comes before the next step.
        await asyncio.sleep(0)
        return StepFinished(result)

    @property
    def measurable(self) -> bool:
        """Whether the engine's memory is its own business, and has to be asked for."""
        return self._paced is not None

    async def measure(self) -> PoolMeasured | EngineAway | EngineFailed:
        """Ask an engine with memory of its own how it stands; steps go on meanwhile."""
        assert self._paced is not None
        try:
            return await asyncio.to_thread(self._paced.measure)
        except EngineAwayError as error:
            return EngineAway(str(error))
        except EngineError as error:
            return EngineFailed(str(error))

    def wake(self) -> None:
        """Let an engine with a pace of its own end the step under way soon: there is something to be decided."""
        if self._paced is not None:
            self._paced.wake()

    def rest(self) -> Awaitable[None]:
        """Let an engine with a pace of its own drop what goes on, after the steps begun so far and before the next."""
        assert self._paced is not None
        return self._thread.begin(self._paced.rest)

    def kv_block(self, index: int) -> Any:
        """Return the memory of a pool block, as the engine port says."""
        return self._engine.kv_block(index)

    def scratch(self, size_bytes: int) -> Any:
        """Return memory like that of the pool, to measure with."""
        return self._engine.scratch(size_bytes)

    async def grammar_fault(self, text: str) -> str | None:
        """Return why the engine cannot use a grammar, or None; steps go on meanwhile."""
        return await asyncio.to_thread(self._engine.check_grammar, text)
