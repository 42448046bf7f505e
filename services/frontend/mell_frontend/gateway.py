"""The shell around the stream core: carries its commands out on the bus and hands tokens to their readers.

It decides nothing about sequences; all it adds is IO, timeouts and logs.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any, assert_never

import structlog

from mell_frontend.generation import GenerationError, SequenceRequest
from mell_frontend.peers import Peers, Timeouts
from mell_frontend.sequence_stream import BufferedStream
from mell_frontend.stream.commands import (
    AskPlacement,
    AskResend,
    CancelSequence,
    Command,
    DeliverTokens,
    FailSequence,
    ReplyControl,
    SubmitSequence,
    TellWaiting,
)
from mell_frontend.stream.core import FrontendCore
from mell_frontend.stream.events import (
    ConnectionLost,
    ConnectionRestored,
    ControlArrived,
    Event,
    PlaceAnswered,
    SequenceClosed,
    SequenceOpened,
    StoodStill,
    Ticked,
    TokensArrived,
)
from mell_frontend.tracing import TracedPeers
from mell_shared.actor import Actor
from mell_shared.bus import Bus, Delivery
from mell_shared.clock import Clock
from mell_shared.codec import InvalidMessageError, decode
from mell_shared.messages.admin import AdminRefused, AdminReply, AdminRequest, StatusRequest
from mell_shared.messages.frontend import FRONTEND_CONTROL, TOKENS_GENERATED, ControlInvalid
from mell_shared.subjects import Subjects
from mell_shared.tracing import NO_TRACER, Tracer

_TICK_S = 0.05
_PROBE_S = 1.0
_READY_US = 5_000_000


class BusGateway:
    """The `Gateway` of the frontend process that the core is named after.

    `run` must run while it is used; open sequences only after `run` has called `started`. To end it well: `drain`,
    wait until it is `emptied` or patience ends, then `give_up`, wait again, `stop`.
    """

    def __init__(  # noqa: PLR0913 - what it stands on
        self,
        bus: Bus,
        subjects: Subjects,
        core: FrontendCore,
        clock: Clock,
        timeouts: Timeouts | None = None,
        *,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.messages_invalid = 0
        self._bus = bus
        self._subjects = subjects
        self._core = core
        self._clock = clock
        self._peers = Peers(bus, subjects, timeouts or Timeouts())
        self._traced_peers = TracedPeers(self._peers, tracer, self._parent_of)
        self._actor: Actor[Event] = Actor("gateway", self._handle)
        self._streams: dict[str, BufferedStream] = {}
        self._connected = True
        self._draining = False
        self._asks = 0
        self._fewer = asyncio.Event()
        self._scheduler_heard_us: int | None = None
        self._log = structlog.get_logger()

    def open(self, request: SequenceRequest) -> BufferedStream:
        """Start to place and run a sequence; problems show at the stream's `next`."""
        stream = BufferedStream(request.sequence, self._close)
        stream.traceparent = request.traceparent
        if self._draining:
            stream.fail(GenerationError("unavailable", "this frontend is stopping; ask another", retry_after_s=1.0))
        elif not self._actor.post(SequenceOpened(request)):
            stream.fail(GenerationError("queue_full", "this frontend is overloaded", retry_after_s=1.0))
        else:
            self._streams[request.sequence] = stream
        return stream

    @property
    def ready(self) -> bool:
        """Whether the broker is connected, a scheduler answered lately and new sequences are taken."""
        if self._draining or not self._bus.connected or self._scheduler_heard_us is None:
            return False
        return self._clock.now_us() - self._scheduler_heard_us < _READY_US

    async def admin(self, request: AdminRequest) -> AdminReply:
        """Return what the leading scheduler answers to an operator; raises `GenerationError` (`unavailable`)."""
        reply = await self._peers.admin(request)
        if not isinstance(reply, AdminRefused) or reply.reason != "not_leader":
            self._scheduler_heard_us = self._clock.now_us()
        return reply

    @property
    def name(self) -> str:
        """The frontend's id."""
        return self._core.frontend

    @property
    def stopping(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._draining

    @property
    def tokens_accepted(self) -> int:
        """Tokens taken from workers since the start."""
        return self._core.stats.tokens_accepted

    @property
    def open_streams(self) -> int:
        """How many sequences have neither ended nor been closed."""
        return len(self._streams)

    async def emptied(self) -> None:
        """Return when no sequence is open and no peer is being asked."""
        while self._streams or self._asks or self._core.open_sequences:
            self._fewer.clear()
            await self._fewer.wait()

    @property
    def counts(self) -> dict[str, int]:
        """All counts since start, by name."""
        own = {"messages_invalid": self.messages_invalid}
        return {**asdict(self._core.stats), **asdict(self._peers.stats), **own}

    async def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Work until `stop`; raises what a bug raised. Calls `started` when sequences can be opened."""
        frontend = self._core.frontend
        tokens = await self._bus.subscribe(self._subjects.frontend_tokens(frontend), self._take_tokens)
        control = await self._bus.subscribe(self._subjects.frontend_control(frontend), self._take_control)
        self._bus.on_reconnect(self._reconnected)
        try:
            await self._actor.run(lambda: self._begin(started))
        finally:
            await tokens.unsubscribe()
            await control.unsubscribe()

    def drain(self) -> None:
        """Take no new sequences and be no longer ready; those that run go on."""
        self._draining = True

    def give_up(self) -> None:
        """Fail the sequences that still run, and stop them on their workers."""
        for stream in list(self._streams.values()):
            stream.fail(GenerationError("unavailable", "this frontend is stopping", retry_after_s=1.0))
            stream.close()

    def stop(self) -> None:
        """End `run` after what waits now; safe to repeat."""
        self._actor.stop()

    def _begin(self, started: Callable[[], None]) -> None:
        self._actor.every(_TICK_S, self._tick, after_standstill=StoodStill)
        self._actor.spawn(self._probe_scheduler())
        started()

    def _close(self, sequence: str) -> None:
        if self._streams.pop(sequence, None) is not None:
            self._post(SequenceClosed(sequence))

    def _post(self, event: Event) -> None:
        if not self._actor.post(event):
            self._actor.spawn(self._actor.put(event))

    def _tick(self) -> Event:
        if self._connected and not self._bus.connected:
            self._connected = False
            self._post(ConnectionLost())
        return Ticked()

    def _reconnected(self) -> None:
        self._connected = True
        self._post(ConnectionRestored())

    async def _probe_scheduler(self) -> None:
        """Keep `ready` true without traffic, and make it true at first."""
        while True:
            heard_us = self._scheduler_heard_us
            if heard_us is None or self._clock.now_us() - heard_us > _PROBE_S * 1e6:
                try:
                    await self.admin(StatusRequest())
                except GenerationError as error:
                    self._log.debug("scheduler_silent", why=error.message)
            await asyncio.sleep(_PROBE_S)

    async def _take_tokens(self, delivery: Delivery) -> None:
        try:
            message = decode(TOKENS_GENERATED, delivery.data)
        except InvalidMessageError as error:
            self._note_invalid(delivery, error)
        else:
            await self._actor.put(TokensArrived(message))

    async def _take_control(self, delivery: Delivery) -> None:
        try:
            message = decode(FRONTEND_CONTROL, delivery.data)
        except InvalidMessageError as error:
            self._note_invalid(delivery, error)
            await self._peers.reply(delivery.reply_to, ControlInvalid(message=str(error)))
        else:
            await self._actor.put(ControlArrived(delivery.reply_to, message))

    def _note_invalid(self, delivery: Delivery, error: InvalidMessageError) -> None:
        self.messages_invalid += 1
        self._log.warning("message_dropped", subject=delivery.subject, size_bytes=len(delivery.data), why=str(error))

    async def _handle(self, event: Event) -> None:
        if isinstance(event, PlaceAnswered):
            self._scheduler_heard_us = self._clock.now_us()
        for command in self._core.handle(event, self._clock.now_us()):
            await self._carry_out(command)
        self._fewer.set()

    async def _carry_out(self, command: Command) -> None:
        match command:
            case DeliverTokens():
                self._deliver(command)
            case ReplyControl(reply_to, reply):
                await self._peers.reply(reply_to, reply)
            case TellWaiting(sequence, position):
                if sequence in self._streams:
                    self._streams[sequence].wait(position)
            case FailSequence():
                self._fail(command)
            case AskPlacement() | SubmitSequence() | AskResend() | CancelSequence():
                self._ask(command)
            case _:
                assert_never(command)

    def _ask(self, command: AskPlacement | SubmitSequence | AskResend | CancelSequence) -> None:
        match command:
            case AskPlacement():
                if command.cause:
                    self._note_placed_again(command)
                self._answer(self._traced_peers.place(command))
            case SubmitSequence():
                self._answer(self._traced_peers.submit(command))
            case AskResend():
                self._answer(self._peers.resend(command))
            case CancelSequence():
                self._answer(self._peers.cancel(command))

    def _parent_of(self, sequence: str) -> str:
        stream = self._streams.get(sequence)
        return "" if stream is None else stream.traceparent

    def _answer(self, ask: Coroutine[Any, Any, Event]) -> None:
        """Let the ask run beside the mailbox; what becomes of it is an event."""
        self._asks += 1
        self._actor.spawn(self._put_answer(ask))

    async def _put_answer(self, ask: Coroutine[Any, Any, Event]) -> None:
        event = await ask
        self._asks -= 1
        await self._actor.put(event)

    def _deliver(self, command: DeliverTokens) -> None:
        stream = self._streams.get(command.sequence)
        if stream is None:
            return  # closed while the tokens waited in the mailbox
        stream.push(command.token_ids, command.logprobs, command.finish_reason, command.cached_tokens)
        if command.finish_reason is not None:
            self._streams.pop(command.sequence, None)

    def _fail(self, command: FailSequence) -> None:
        self._log.warning("sequence_failed", sequence=command.sequence, kind=command.failure, why=command.message)
        stream = self._streams.pop(command.sequence, None)
        if stream is not None:
            stream.fail(
                GenerationError(
                    command.failure,
                    command.message,
                    retry_after_s=command.retry_after_s,
                    limit_tokens=command.limit_tokens,
                )
            )

    def _note_placed_again(self, command: AskPlacement) -> None:
        message = command.message
        self._log.info(
            "sequence_placed_again", sequence=message.sequence, generation=message.generation, why=command.cause
        )
