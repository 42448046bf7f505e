"""A small frontend for the worker's tests: submits, collects tokens, answers statuses, as the protocol asks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mell_gpu_worker.engine.base import Engine
from mell_gpu_worker.engine_runner import EngineRunner, EngineThread
from mell_gpu_worker.service import WorkerService
from mell_gpu_worker.settings import WorkerSettings
from mell_gpu_worker.surroundings import Surroundings
from mell_gpu_worker.worker_config import core_config
from mell_shared.bus import Bus, Delivery, NoResponderError, RequestTimeoutError
from mell_shared.clock import Clock
from mell_shared.codec import decode, encode
from mell_shared.messages.frontend import (
    FRONTEND_CONTROL,
    TOKENS_GENERATED,
    Evicted,
    EvictionTaken,
    StreamStatus,
    StreamStatusReply,
    TokensGenerated,
)
from mell_shared.messages.scheduler import SCHEDULER_EVENT, SchedulerEvent, WorkerJoined
from mell_shared.messages.worker import WORKER_REPLY, Submit, WorkerCommand, WorkerReply
from mell_shared.subjects import Subjects

SUBJECTS = Subjects("test")


@dataclass
class Stream:
    """One sequence as its frontend has it."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


class SmallFrontend:
    """Collects what workers send to one frontend and, as a scheduler would, the workers' events."""

    def __init__(self, bus: Bus, name: str = "f1") -> None:
        self.bus = bus
        self.name = name
        self.streams: dict[str, Stream] = {}
        self.evicted: list[Evicted] = []
        self.events: list[SchedulerEvent] = []
        self.statuses: list[StreamStatus] = []
        self.answers = True
        self._news = asyncio.Event()

    async def start(self) -> None:
        """Listen."""
        await self.bus.subscribe(SUBJECTS.frontend_tokens(self.name), self._take_tokens)
        await self.bus.subscribe(SUBJECTS.frontend_control(self.name), self._take_control)
        await self.bus.subscribe(SUBJECTS.scheduler_events, self._take_event)

    async def until(self, condition: object, timeout_s: float = 60.0) -> None:
        """Return when `condition()` holds; the timeout only ends a test that has failed."""
        assert callable(condition)
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def worker(self) -> str:
        """The id of the first worker that joined."""
        await self.until(lambda: any(isinstance(event, WorkerJoined) for event in self.events))
        return next(event.spec.worker for event in self.events if isinstance(event, WorkerJoined))

    async def command(self, worker: str, command: WorkerCommand, attempts: int = 20) -> WorkerReply:
        """Send a command, again and again until it is answered."""
        for _ in range(attempts):
            try:
                data = await self.bus.request(SUBJECTS.worker_commands(worker), encode(command), 2.0)
                return decode(WORKER_REPLY, data, unknown_fields="forbid")
            except (RequestTimeoutError, NoResponderError):
                continue
        raise AssertionError("the worker never answers")

    async def submit(self, worker: str, message: Submit) -> WorkerReply:
        """Submit, ready to collect."""
        self.streams.setdefault(message.sequence, Stream())
        return await self.command(worker, message)

    async def finished(self, *sequences: str) -> None:
        """Return when these have ended."""
        await self.until(lambda: all(self.streams[sequence].finish for sequence in sequences))

    async def _take_event(self, delivery: Delivery) -> None:
        self.events.append(decode(SCHEDULER_EVENT, delivery.data, unknown_fields="forbid"))
        self._news.set()

    async def _take_tokens(self, delivery: Delivery) -> None:
        message = decode(TOKENS_GENERATED, delivery.data, unknown_fields="forbid")
        start = 0
        for row, sequence in enumerate(message.sequences):
            end = start + message.counts[row]
            self._take_row(message, row, sequence, message.token_ids[start:end])
            start = end
        self._news.set()

    def _take_row(self, message: TokensGenerated, row: int, sequence: str, token_ids: list[int]) -> None:
        stream = self.streams.get(sequence)
        first = message.first_indices[row]
        if stream is None or first > len(stream.tokens):
            return  # a gap: the next status mends it
        known = len(stream.tokens) - first
        assert stream.tokens[first : first + len(token_ids)] == token_ids[:known], "two texts for one sequence"
        stream.tokens += token_ids[known:]
        if row in message.finished and known <= len(token_ids):
            stream.finish = message.finished[row]

    async def _take_control(self, delivery: Delivery) -> None:
        message = decode(FRONTEND_CONTROL, delivery.data, unknown_fields="forbid")
        if not self.answers:
            return
        if isinstance(message, StreamStatus):
            self.statuses.append(message)
            await self.bus.publish(delivery.reply_to, encode(self._judge(message)))
        elif isinstance(message, Evicted):
            self.evicted.append(message)
            await self.bus.publish(delivery.reply_to, encode(EvictionTaken()))
        self._news.set()

    def _judge(self, status: StreamStatus) -> StreamStatusReply:
        resend: dict[int, int] = {}
        cancel: list[int] = []
        ack_end: list[int] = []
        for row, sequence in enumerate(status.sequences):
            stream = self.streams.get(sequence)
            if stream is None:
                cancel.append(row)
            elif stream.finish:
                ack_end.append(row)
            elif status.ended[row] or status.next_indices[row] > len(stream.tokens):
                resend[row] = len(stream.tokens)
        return StreamStatusReply(resend=resend, cancel=cancel, ack_end=ack_end)


def worker_settings(**changes: object) -> WorkerSettings:
    """Settings of a small fake worker, blind to this machine's environment."""
    fields = {"engine": "fake", "model": "fake", "kv_blocks": 64, "max_sequences": 8, "max_step_tokens": 64}
    return WorkerSettings(**(fields | changes))  # type: ignore[arg-type]


@dataclass
class RunningWorker:
    """A service on a bus, its stop signal, and the task it runs in."""

    service: WorkerService
    stop: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def running_worker(
    bus: Bus, engine: Engine, clock: Clock, settings: WorkerSettings
) -> AsyncIterator[RunningWorker]:
    """Run a worker while the context lasts; what its run raises is the test's to look at in `task`."""
    thread = EngineThread()
    service = WorkerService(
        core_config(settings, "w1", engine.spec),
        EngineRunner(engine, thread, settings.step_timeout_s),
        Surroundings(bus=bus, subjects=SUBJECTS, clock=clock),
    )
    stop = asyncio.Event()
    task = asyncio.create_task(service.run(stop))
    try:
        yield RunningWorker(service, stop, task)
    finally:
        task.cancel()
        await asyncio.wait([task])
        thread.close()
        engine.close()
