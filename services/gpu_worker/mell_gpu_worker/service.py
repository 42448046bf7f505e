"""The worker's shell: deliveries and engine results become events, the core's commands become messages and steps."""

import asyncio
import logging
from collections.abc import Awaitable
from functools import partial

import structlog

from mell_gpu_worker.core.commands import (
    AskFrontend,
    AskPeer,
    AskStatus,
    CloseLink,
    Command,
    Exit,
    OfferKv,
    OpenLink,
    PublishEvent,
    PublishTokens,
    Reply,
    Rest,
    RunStep,
    SendBlocks,
    SendEvicted,
    TellDropped,
)
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.events import (
    CommandReceived,
    ConnectionLost,
    ConnectionRestored,
    EngineAway,
    EngineFailed,
    Event,
    StepFinished,
    StoodStill,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.worker import WorkerCore
from mell_gpu_worker.data_plane import DataPlane
from mell_gpu_worker.engine_runner import EngineRunner
from mell_gpu_worker.lanes import Lanes
from mell_gpu_worker.metrics import MoveMetrics, WorkerCollector, WorkerCounts
from mell_gpu_worker.peers import Peers, Question
from mell_gpu_worker.surroundings import Surroundings
from mell_gpu_worker.tracing import WorkerTraces
from mell_shared.actor import STOOD_STILL_S, Actor
from mell_shared.bus import BusError, Delivery, Subscription
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.base import Message
from mell_shared.messages.scheduler import MigrationCommitted, MigrationFailed, SchedulerEvent
from mell_shared.messages.worker import WORKER_COMMAND, CommandInvalid, ReserveKv, Submit

_SHORTEST_SLEEP_S = 0.001
_LONGEST_SLEEP_S = 0.1
"""How late a lost connection is noticed."""
_MEASURE_EVERY_S = 1.0
"""How often an engine that manages its own memory is asked how that stands."""


class WorkerService:
    """One worker on a bus. `run` lasts until it has stopped; `failure` then says why, if the engine failed."""

    def __init__(self, config: WorkerConfig, engine: EngineRunner, around: Surroundings) -> None:
        self.core = WorkerCore(config, around.clock.now_us())
        self.counts = WorkerCounts()
        self.moves = MoveMetrics()
        self.failure = ""
        self._engine = engine
        self._bus = around.bus
        self._subjects = around.subjects
        self._clock = around.clock
        self._log = structlog.get_logger()
        self._actor: Actor[Event] = Actor("gpu_worker", self._handle)
        self._traces = WorkerTraces(around.tracer, self.core)
        self._peers = Peers(around.bus, around.subjects, self.counts, self._traces.outgoing)
        self._data_counts = around.data_counts
        self._data: DataPlane | None = None
        self._lanes: Lanes | None = None
        if around.transport is not None:
            self._data = DataPlane(around, engine.kv_block, put=self._actor.put, spawn=self._actor.spawn)
            if around.lanes.probes_per_minute:
                self._lanes = Lanes(config.spec, engine, around, self._actor.spawn)
        self._connected = True
        self._subscriptions: list[Subscription] = []

    def collector(self) -> WorkerCollector:
        """Return this worker's metrics."""
        return WorkerCollector(self.core, self.counts, self.moves, self._data_counts)

    @property
    def transfers(self) -> int:
        """KV transfers that are not closed."""
        return 0 if self._data is None else len(self._data)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set and everything is said, or the engine fails; the bus stays open."""
        worker = self.core.config.spec.worker
        self._bus.on_reconnect(self._tell_reconnection)
        for subject in (self._subjects.worker_commands(worker), self._subjects.all_workers):
            self._subscriptions.append(await self._bus.subscribe(subject, self._deliver))
        if self._lanes is not None:
            self._subscriptions += await self._lanes.subscribe()
        try:
            await self._actor.run(partial(self._started, stop))
        finally:
            await self._unsubscribe()
            if self._data is not None:
                await self._data.close()

    def _started(self, stop: asyncio.Event) -> None:
        self._actor.spawn(self._bus.watch())
        self._actor.spawn(self._tell_time())
        self._actor.spawn(self._tell_stop(stop))
        if self._lanes is not None:
            self._actor.spawn(self._lanes.run())
        if self._engine.measurable:
            self._actor.spawn(self._tell_measures())
        spec = self.core.config.spec
        self._log.info(
            "ready",
            worker=spec.worker,
            model=spec.model,
            engine=spec.engine,
            device=spec.device,
            kv_blocks=spec.kv_blocks,
            max_model_len=spec.max_model_len,
            migration_modes=spec.migration_modes,
        )

    # --- what happens, to the core

    async def _tell_time(self) -> None:
        due_us = self._clock.now_us()
        while True:
            if self._clock.now_us() - due_us > STOOD_STILL_S * 1e6:
                self._actor.post(StoodStill())
            if self._connected and not self._bus.connected:
                self._connected = False
                self._log.warning("connection_lost")
                self._actor.post(ConnectionLost())
            self._actor.post(TimePassed())
            now_us = self._clock.now_us()
            sleep_s = min(max((self.core.wake_us - now_us) / 1e6, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S)
            due_us = now_us + round(sleep_s * 1e6)
            await asyncio.sleep(sleep_s)

    def _tell_reconnection(self) -> None:
        self._connected = True
        self._log.info("connection_restored")
        self._actor.post(ConnectionRestored())

    async def _tell_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._log.info("stopping", sequences=len(self.core.streams))
        await self._actor.put(StopRequested())

    async def _tell_measures(self) -> None:
        away = False
        while True:
            measured = await self._engine.measure()
            if isinstance(measured, EngineAway) and not away:
                self._log.warning("engine_away", message=measured.message)
            elif away and not isinstance(measured, EngineAway):
                self._log.info("engine_back")
            away = isinstance(measured, EngineAway)
            await self._actor.put(measured)
            await asyncio.sleep(_MEASURE_EVERY_S)

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            command = decode(WORKER_COMMAND, delivery.data)
        except InvalidMessageError as error:
            await self._reject(delivery, str(error))
            return
        if isinstance(command, Submit | ReserveKv) and command.sampling.grammar is not None:
            # A task, since compiling it may take longer than other commands should wait.
            self._actor.spawn(self._deliver_with_grammar(command, command.sampling.grammar.text, delivery.reply_to))
            return
        await self._actor.put(CommandReceived(command, delivery.reply_to))

    async def _deliver_with_grammar(self, command: Submit | ReserveKv, grammar: str, reply_to: str) -> None:
        fault = await self._engine.grammar_fault(grammar)
        await self._actor.put(CommandReceived(command, reply_to, fault))

    async def _reject(self, delivery: Delivery, fault: str) -> None:
        self.counts.invalid_messages += 1
        self._log.warning("invalid_command", fault=fault, size_bytes=len(delivery.data))
        if delivery.reply_to:
            await self._publish(delivery.reply_to, CommandInvalid(message=fault))

    # --- what the core wants, to the world

    async def _handle(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            self.counts.took_step(event.result)
        elif self.core.batcher.computing:
            self._engine.wake()
        now_us = self._clock.now_us()
        commands = self.core.handle(event, now_us)
        self._traces.follow(event, commands, now_us)
        if commands and self._log.is_enabled_for(logging.DEBUG):
            # Kinds only: what they hold are people's texts.
            self._log.debug("handled", cause=_kind(event), commands=[_kind(command) for command in commands])
        for command in commands:
            await self._perform(command)

    async def _perform(self, command: Command) -> None:
        match command:
            case RunStep(rows):
                self._actor.spawn(self._tell_outcome(self._engine.step(rows)))
                await asyncio.sleep(0)  # gives way to the engine's thread, which needs the interpreter to begin
            case Rest():
                self._actor.spawn(_until(self._engine.rest()))
            case PublishTokens(frontend, tokens):
                await self._publish(self._subjects.frontend_tokens(frontend), tokens)
            case PublishEvent(event):
                self._note(event)
                await self._publish(self._subjects.scheduler_events, event)
            case Reply(reply_to, reply):
                self.counts.replied(reply)
                await self._publish(reply_to, reply)
            case AskStatus() | SendEvicted() | AskPeer() | AskFrontend():
                self._actor.spawn(self._ask(command))
            case OfferKv() | OpenLink() | SendBlocks() | CloseLink():
                assert self._data is not None, "a worker without a transport moves nothing"
                self._data.perform(command)
            case TellDropped(migration, sequence, source, reason):
                self._log.info(
                    "reservation_dropped", migration=migration, sequence=sequence, source=source, reason=reason
                )
            case Exit(failure):
                self.failure = failure
                self._log.info("stopped", failure=failure)
                await self._unsubscribe()
                self._actor.stop()

    async def _unsubscribe(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    def _note(self, event: SchedulerEvent) -> None:
        """Count and log what became of a move: one line for each, with its id, at the end that tells of it."""
        self.moves.published(event)
        if isinstance(event, MigrationCommitted):
            self._log.info("migration_committed", **event.model_dump(exclude={"kind", "worker"}))
        elif isinstance(event, MigrationFailed):
            self._log.warning("migration_failed", **event.model_dump(exclude={"kind", "worker"}))

    async def _ask(self, question: Question) -> None:
        await self._actor.put(await self._peers.ask(question))

    async def _tell_outcome(self, outcome: Awaitable[StepFinished | EngineFailed]) -> None:
        await self._actor.put(await outcome)

    async def _publish(self, subject: str, message: Message) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except BusError as error:
            # The status sent after the reconnection repairs what this loses.
            self.counts.unsent_messages += 1
            self._log.debug("unsent", subject=subject, why=str(error))


async def _until(done: Awaitable[None]) -> None:
    await done


def _kind(value: Event | Command) -> str:
    """Name an event or command, and the kind of message in it."""
    inner = getattr(value, "message", None) or getattr(value, "command", None)
    name = type(value).__name__
    return f"{name}({type(inner).__name__})" if isinstance(inner, Message) else name
