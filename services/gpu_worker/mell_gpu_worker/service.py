"""The worker's shell: deliveries and engine results become events, the core's commands become messages and steps."""

import asyncio
import logging
from functools import partial

import structlog

from mell_gpu_worker.core.commands import (
    AskStatus,
    Command,
    Exit,
    PublishEvent,
    PublishTokens,
    Reply,
    RunStep,
    SendEvicted,
)
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.events import (
    CommandReceived,
    ConnectionLost,
    ConnectionRestored,
    Event,
    EvictionAnswered,
    EvictionUnanswered,
    StatusAnswered,
    StatusUnanswered,
    StepFinished,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.worker import WorkerCore
from mell_gpu_worker.engine.base import EngineSpec
from mell_gpu_worker.engine_runner import EngineRunner
from mell_gpu_worker.metrics import WorkerCounts
from mell_gpu_worker.settings import WorkerSettings
from mell_shared.actor import Actor
from mell_shared.bus import Bus, BusError, Delivery, Subscription
from mell_shared.clock import Clock
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.base import Message
from mell_shared.messages.frontend import (
    FRONTEND_REPLY,
    Evicted,
    EvictionTaken,
    FrontendReply,
    Refused,
    StreamStatus,
    StreamStatusReply,
)
from mell_shared.messages.scheduler import WorkerSpec
from mell_shared.messages.worker import WORKER_COMMAND, CommandInvalid, Submit
from mell_shared.subjects import Subjects

FRONTEND_TIMEOUT_S = 1.0
"""For a frontend's answer to a status or an eviction."""
_SHORTEST_SLEEP_S = 0.001
_LONGEST_SLEEP_S = 0.1
"""How late a lost connection is noticed."""


class WorkerService:
    """One worker on a bus. `run` lasts until it has stopped; `failure` then says why, if the engine failed."""

    def __init__(self, config: WorkerConfig, engine: EngineRunner, bus: Bus, subjects: Subjects, clock: Clock) -> None:
        self.core = WorkerCore(config, clock.now_us())
        self.counts = WorkerCounts()
        self.failure = ""
        self._engine = engine
        self._bus = bus
        self._subjects = subjects
        self._clock = clock
        self._log = structlog.get_logger()
        self._actor: Actor[Event] = Actor("gpu_worker", self._handle)
        self._connected = True
        self._subscriptions: list[Subscription] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set and everything is said, or the engine fails; the bus stays open."""
        worker = self.core.config.spec.worker
        self._bus.on_reconnect(self._tell_reconnection)
        for subject in (self._subjects.worker_commands(worker), self._subjects.all_workers):
            self._subscriptions.append(await self._bus.subscribe(subject, self._deliver))
        try:
            await self._actor.run(partial(self._started, stop))
        finally:
            await self._unsubscribe()

    def _started(self, stop: asyncio.Event) -> None:
        self._actor.spawn(self._bus.watch())
        self._actor.spawn(self._tell_time())
        self._actor.spawn(self._tell_stop(stop))
        spec = self.core.config.spec
        self._log.info(
            "ready",
            worker=spec.worker,
            model=spec.model,
            engine=spec.engine,
            device=spec.device,
            kv_blocks=spec.kv_blocks,
            max_model_len=spec.max_model_len,
        )

    # --- what happens, to the core

    async def _tell_time(self) -> None:
        while True:
            if self._connected and not self._bus.connected:
                self._connected = False
                self._log.warning("connection_lost")
                self._actor.post(ConnectionLost())
            self._actor.post(TimePassed())
            sleep_s = (self.core.wake_us - self._clock.now_us()) / 1e6
            await asyncio.sleep(min(max(sleep_s, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))

    def _tell_reconnection(self) -> None:
        self._connected = True
        self._log.info("connection_restored")
        self._actor.post(ConnectionRestored())

    async def _tell_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._log.info("stopping", sequences=len(self.core.streams))
        await self._actor.put(StopRequested())

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            command = decode(WORKER_COMMAND, delivery.data)
        except InvalidMessageError as error:
            await self._reject(delivery, str(error))
            return
        if isinstance(command, Submit) and command.sampling.grammar is not None:
            # A task, since compiling it may take longer than other commands should wait.
            self._actor.spawn(self._deliver_with_grammar(command, command.sampling.grammar.text, delivery.reply_to))
            return
        await self._actor.put(CommandReceived(command, delivery.reply_to))

    async def _deliver_with_grammar(self, submit: Submit, grammar: str, reply_to: str) -> None:
        fault = await self._engine.grammar_fault(grammar)
        await self._actor.put(CommandReceived(submit, reply_to, fault))

    async def _reject(self, delivery: Delivery, fault: str) -> None:
        self.counts.invalid_messages += 1
        self._log.warning("invalid_command", fault=fault, size_bytes=len(delivery.data))
        if delivery.reply_to:
            await self._publish(delivery.reply_to, CommandInvalid(message=fault))

    # --- what the core wants, to the world

    async def _handle(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            self.counts.took_step(event.result)
        commands = self.core.handle(event, self._clock.now_us())
        if commands and self._log.is_enabled_for(logging.DEBUG):
            # Kinds only: what they hold are people's texts.
            self._log.debug("handled", cause=_kind(event), commands=[_kind(command) for command in commands])
        for command in commands:
            await self._perform(command)

    async def _perform(self, command: Command) -> None:
        match command:
            case RunStep():
                self._actor.spawn(self._run_step(command))
            case PublishTokens(frontend, tokens):
                await self._publish(self._subjects.frontend_tokens(frontend), tokens)
            case PublishEvent(event):
                await self._publish(self._subjects.scheduler_events, event)
            case Reply(reply_to, reply):
                self.counts.replied(reply)
                await self._publish(reply_to, reply)
            case AskStatus():
                self._actor.spawn(self._ask_status(command))
            case SendEvicted():
                self._actor.spawn(self._send_evicted(command))
            case Exit(failure):
                self.failure = failure
                self._log.info("stopped", failure=failure)
                await self._unsubscribe()
                self._actor.stop()

    async def _unsubscribe(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    async def _run_step(self, command: RunStep) -> None:
        await self._actor.put(await self._engine.step(command.rows))

    async def _ask_status(self, command: AskStatus) -> None:
        frontend, status = command.frontend, command.message
        reply = await self._ask(frontend, status)
        if isinstance(reply, StreamStatusReply):
            await self._actor.put(StatusAnswered(frontend, status, reply))
        else:
            await self._actor.put(StatusUnanswered(frontend))

    async def _send_evicted(self, command: SendEvicted) -> None:
        key = (command.message.sequence, command.message.generation)
        reply = await self._ask(command.frontend, command.message)
        known = isinstance(reply, EvictionTaken | Refused)
        await self._actor.put(EvictionAnswered(*key) if known else EvictionUnanswered(*key))

    async def _ask(self, frontend: str, message: StreamStatus | Evicted) -> FrontendReply | None:
        """Return a frontend's answer, or None if none came in time or it makes no sense."""
        subject = self._subjects.frontend_control(frontend)
        try:
            data = await self._bus.request(subject, encode(message), FRONTEND_TIMEOUT_S)
            return decode(FRONTEND_REPLY, data)
        except BusError as error:
            self._log.debug("frontend_silent", frontend=frontend, why=str(error))
        except InvalidMessageError as error:
            self.counts.invalid_messages += 1
            self._log.warning("invalid_reply", frontend=frontend, fault=str(error))
        return None

    async def _publish(self, subject: str, message: Message) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except BusError as error:
            # The status sent after the reconnection repairs what this loses.
            self.counts.unsent_messages += 1
            self._log.debug("unsent", subject=subject, why=str(error))


def _kind(value: Event | Command) -> str:
    """Name an event or command, and the kind of message in it."""
    inner = getattr(value, "message", None) or getattr(value, "command", None)
    name = type(value).__name__
    return f"{name}({type(inner).__name__})" if isinstance(inner, Message) else name


def core_config(settings: WorkerSettings, worker: str, engine: EngineSpec) -> WorkerConfig:
    """Return what the core needs to know of its settings and its engine."""
    spec = WorkerSpec(
        worker=worker,
        name=settings.worker_name,
        host=settings.worker_host,
        model=settings.public_model,
        engine=engine.name,
        device=engine.device,
        kv_layout=engine.kv_layout,
        max_model_len=engine.max_model_len,
        kv_blocks=engine.kv_blocks,
        block_tokens=engine.block_tokens,
        max_sequences=settings.max_sequences,
    )
    return WorkerConfig(
        spec=spec,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        max_step_tokens=settings.max_step_tokens,
        prefix_cache=settings.prefix_cache,
        report_interval_us=round(settings.report_interval_s * 1e6),
        status_interval_us=round(settings.status_interval_s * 1e6),
        frontend_silence_us=round(settings.frontend_silence_s * 1e6),
        stop_deadline_us=round(settings.stop_deadline_s * 1e6),
    )
