"""A small frontend for the worker's tests: submits, collects tokens, answers statuses, as the protocol asks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from mell_gpu_worker.engine.base import Engine
from mell_gpu_worker.engine_runner import EngineRunner, EngineThread
from mell_gpu_worker.service import WorkerService
from mell_gpu_worker.settings import WorkerSettings
from mell_gpu_worker.surroundings import Surroundings
from mell_gpu_worker.worker_config import core_config
from mell_shared.bus import Bus, Delivery, NoResponderError, RequestTimeoutError
from mell_shared.clock import Clock, SystemClock
from mell_shared.codec import decode, encode
from mell_shared.messages.frontend import (
    FRONTEND_CONTROL,
    TOKENS_GENERATED,
    AbortMigration,
    Claim,
    ClaimRefusal,
    Evicted,
    EvictionTaken,
    Granted,
    MigrationAborted,
    Refused,
    StreamStatus,
    StreamStatusReply,
    TokensGenerated,
)
from mell_shared.messages.scheduler import (
    SCHEDULER_EVENT,
    MigrationCommitted,
    MigrationFailed,
    SchedulerEvent,
    WorkerJoined,
)
from mell_shared.messages.worker import (
    WORKER_REPLY,
    Migrate,
    MigrateAccepted,
    Submit,
    WorkerCommand,
    WorkerReply,
)
from mell_shared.subjects import Subjects

SUBJECTS = Subjects("test")
Outcome = MigrationCommitted | MigrationFailed


@dataclass
class Stream:
    """One sequence as its frontend has it."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    owner: str = ""
    generation: int = 1
    granted: str = ""
    """The migration that was granted last."""
    aborted: set[str] = field(default_factory=set)
    arrived_us: list[int] = field(default_factory=list)
    """When each token came."""

    def claim(self, claim: Claim) -> Granted | Refused:
        """Rule on a claim as an arbiter does (design: one arbiter for each sequence)."""
        if claim.migration == self.granted:
            return Granted(generation=self.generation, accepted=len(self.tokens))
        refusals: dict[ClaimRefusal, bool] = {
            "ended": self.finish is not None,
            "generation": claim.generation != self.generation,
            "owner": claim.source != self.owner,
            "aborted": claim.migration in self.aborted,
            "length": claim.length < len(self.tokens),
        }
        for reason, holds in refusals.items():
            if holds:
                return Refused(reason=reason)
        self.owner, self.granted = claim.target, claim.migration
        self.generation += 1
        return Granted(generation=self.generation, accepted=len(self.tokens))

    def abort(self, abort: AbortMigration) -> MigrationAborted:
        """Grant a claim never, unless it was granted already."""
        self.aborted.add(abort.migration)
        return MigrationAborted(owned=self.granted != abort.migration and self.finish is None)


class SmallFrontend:
    """Collects what workers send to one frontend and, as a scheduler would, the workers' events."""

    def __init__(self, bus: Bus, name: str = "f1", clock: Clock | None = None) -> None:
        self.bus = bus
        self.clock = clock or SystemClock()
        self.name = name
        self.streams: dict[str, Stream] = {}
        self.evicted: list[Evicted] = []
        self.events: list[SchedulerEvent] = []
        self.statuses: list[StreamStatus] = []
        self.answers = True
        self._moves = 0
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
        stream = self.streams.setdefault(message.sequence, Stream())
        stream.owner, stream.generation = worker, message.generation
        return await self.command(worker, message)

    async def move(self, sequence: str, target: str, **order: Any) -> Outcome | WorkerReply:
        """Order a move as a scheduler does; return what became of it, or the refusal."""
        stream = self.streams[sequence]
        self._moves += 1
        name = f"{self.name}-{self._moves}"
        told = {"mode": "kv", "reason": "manual", "term": 1, "generation": stream.generation} | order
        reply = await self.command(stream.owner, Migrate(migration=name, sequence=sequence, target=target, **told))
        if not isinstance(reply, MigrateAccepted):
            return reply
        await self.until(lambda: self.outcome(name) is not None)
        outcome = self.outcome(name)
        assert outcome is not None
        return outcome

    def outcome(self, migration: str) -> Outcome | None:
        """What the schedulers have heard of a move."""
        told = [e for e in self.events if isinstance(e, Outcome)]
        return next((event for event in told if event.migration == migration), None)

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
        if (message.worker, message.generations[row]) != (stream.owner, stream.generation):
            return  # of a former owner
        known = len(stream.tokens) - first
        assert stream.tokens[first : first + len(token_ids)] == token_ids[:known], "two texts for one sequence"
        stream.tokens += token_ids[known:]
        stream.arrived_us += [self.clock.now_us()] * (len(stream.tokens) - len(stream.arrived_us))
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
        elif isinstance(message, Claim | AbortMigration):
            await self.bus.publish(delivery.reply_to, encode(self._rule(message)))
        self._news.set()

    def _rule(self, message: Claim | AbortMigration) -> Granted | Refused | MigrationAborted:
        stream = self.streams.get(message.sequence)
        if isinstance(message, Claim):
            return Refused(reason="unknown") if stream is None else stream.claim(message)
        return MigrationAborted(owned=False) if stream is None else stream.abort(message)

    def _judge(self, status: StreamStatus) -> StreamStatusReply:
        resend: dict[int, int] = {}
        cancel: list[int] = []
        ack_end: list[int] = []
        for row, sequence in enumerate(status.sequences):
            stream = self.streams.get(sequence)
            if stream is None or (stream.owner, stream.generation) != (status.worker, status.generations[row]):
                cancel.append(row)
            elif stream.finish:
                ack_end.append(row)
            elif status.ended[row] or status.next_indices[row] > len(stream.tokens):
                resend[row] = len(stream.tokens)
        return StreamStatusReply(resend=resend, cancel=cancel, ack_end=ack_end)


def worker_settings(**changes: object) -> WorkerSettings:
    """Settings of a small fake worker, blind to this machine's environment."""
    fields = {
        "worker_name": "w1",
        "engine": "fake",
        "model": "fake",
        "kv_blocks": 64,
        "max_sequences": 8,
        "max_step_tokens": 64,
    }
    return WorkerSettings(**(fields | changes))  # type: ignore[arg-type]


@dataclass
class RunningWorker:
    """A service on a bus, its stop signal, and the task it runs in."""

    service: WorkerService
    stop: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def running_worker(
    bus: Bus,
    engine: Engine,
    clock: Clock,
    settings: WorkerSettings,
    runner: type[EngineRunner] = EngineRunner,
    **around: Any,
) -> AsyncIterator[RunningWorker]:
    """Run a worker while the context lasts; what its run raises is the test's to look at in `task`.

    `around` are fields of `Surroundings`.
    """
    thread = EngineThread()
    service = WorkerService(
        core_config(settings, settings.worker_name, engine.spec),
        runner(engine, thread, settings.step_timeout_s),
        Surroundings(bus=bus, subjects=SUBJECTS, clock=clock, **around),
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
