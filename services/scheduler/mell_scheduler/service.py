"""The scheduler's shell: hands what comes over the bus to the core, and sends what it says. Decides nothing."""

import asyncio
import time
from dataclasses import asdict
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry

from mell_scheduler.candidate import Leadership
from mell_scheduler.core import (
    Announce,
    Answer,
    AskReport,
    Command,
    ConnectionRestored,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    MigrationSettled,
    OperatorAsked,
    OrderDrain,
    PlaceRequested,
    Reply,
    SchedulerCore,
    StartMigration,
    Tick,
    WantGpus,
)
from mell_scheduler.core.journal import header_line
from mell_scheduler.core.pricing import NEWS_PATIENCE_US, Pricing
from mell_scheduler.event_log import EventLog
from mell_scheduler.herald import Herald
from mell_scheduler.inbox import Inbox
from mell_scheduler.metrics import SchedulerCollector, Tally, decision_seconds, epoch_seconds
from mell_scheduler.move_metrics import MoveMetrics
from mell_scheduler.movers import Movers
from mell_scheduler.operators import Operators
from mell_scheduler.packing_metrics import PackingMeter
from mell_scheduler.pause import PauseMemory
from mell_scheduler.policy import make_policy
from mell_scheduler.settings import TICK_S, SchedulerSettings
from mell_scheduler.tracing import SchedulerTraces
from mell_shared.actor import Actor
from mell_shared.bus import Bus, BusError, Delivery, Subscription
from mell_shared.clock import Clock
from mell_shared.codec import encode
from mell_shared.events.outbox import Emit, nowhere
from mell_shared.key_value import KeyValue
from mell_shared.messages.admin import AdminRefused, MovingReply, MovingRequest
from mell_shared.messages.base import Message
from mell_shared.messages.scheduler import Placed, PlaceReply, Queued, Rejected
from mell_shared.messages.worker import Report
from mell_shared.subjects import Subjects
from mell_shared.tracing import NO_TRACER, Tracer

_LOUD = ("lost", "silent", "refused")


class Contest(Protocol):
    """How this scheduler comes to lead: `AlwaysLeads` or `Candidate`."""

    @property
    def kept(self) -> KeyValue | None:
        """Where what must outlast leaders is kept, if anywhere."""
        ...

    async def prepare(self) -> None:
        """Check that standing for leader is possible; raises `StartError`."""
        ...

    def leads(self) -> bool:
        """Whether this scheduler may decide now."""
        ...

    async def run(self, leadership: Leadership) -> None:
        """Stand for leader until cancelled."""
        ...

    async def resign(self) -> None:
        """Give up what is held."""
        ...


class SchedulerService:
    """One scheduler process. While it leads it has a core and listens; else it only stands for leader."""

    def __init__(  # noqa: PLR0913 - what a process is made of
        self,
        bus: Bus,
        settings: SchedulerSettings,
        contest: Contest,
        *,
        process: str,
        clock: Clock,
        emit: Emit = nowhere,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._contest = contest
        self._clock = clock
        self._subjects = Subjects(settings.subject_prefix)
        self._actor: Actor[Event] = Actor("scheduler", self._handle)
        self._tally = Tally()
        self._inbox = Inbox(self._subjects, self._tally, self._actor.put)
        self._operators = Operators(settings, process, clock, self._tally, send=self._send, put=self._actor.put)
        self._movers = Movers(bus, self._subjects, settings.migrate_timeout_s)
        self._traces = SchedulerTraces(tracer)
        self._pricing = Pricing(NEWS_PATIENCE_US)
        self.herald = Herald(emit, settings.policy)
        self._core: SchedulerCore | None = None
        self._subscriptions: list[Subscription] = []
        self._pause = PauseMemory(bus, self._subjects, contest.kept)
        self._told_to_pause = False
        """An operator has said something of moves since this scheduler leads."""
        self._event_log = self._open_event_log()
        self._registry = CollectorRegistry()
        self._decision_seconds = decision_seconds(self._registry)
        self._epoch_seconds = epoch_seconds(self._registry)
        self._move_metrics = MoveMetrics(self._registry)
        self._packing = PackingMeter()
        self._registry.register(self._packing)
        self._registry.register(SchedulerCollector(self._tally, lambda: self._core))
        self._log = structlog.get_logger()

    @property
    def registry(self) -> CollectorRegistry:
        """The metrics of this service."""
        return self._registry

    @property
    def healthy(self) -> bool:
        """Whether it can do its part: decide, or stand by."""
        return self._bus.connected

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then leave in order: answer who waits, give the lease back."""
        await self._contest.prepare()
        hears = await self._pause.listen()
        self._bus.on_reconnect(self._reconnected)
        async with asyncio.TaskGroup() as group:
            actor = group.create_task(self._actor.run(self._start_ticking))
            beside = [group.create_task(self._bus.watch()), group.create_task(self._contest.run(self))]
            if not hears:
                beside.append(group.create_task(self._pause.listen_yet()))
            await stop.wait()
            self._actor.post_anyway(LeadershipEnded())
            self._actor.stop()
            await actor
            for task in beside:
                task.cancel()
        await self._contest.resign()
        if self._event_log is not None:
            self._event_log.close()

    async def _recall_pause(self) -> None:
        """Go on as an operator wanted of an earlier leader; what this one has been told itself counts more."""
        paused, core = await self._pause.recall(), self._core
        if core is not None and not self._told_to_pause and core.moves_paused != paused:
            self._actor.post(OperatorAsked("", MovingRequest(paused=paused)))

    async def _keep_pause(self, answer: Answer, told: MovingReply) -> None:
        """Answer an operator when what was said is written down, or say that it is not."""
        kept = await self._pause.keep(paused=told.paused)
        await self._send(answer.handle, told.model_copy(update={"kept": kept}))

    def _start_ticking(self) -> None:
        self._actor.every(TICK_S, Tick, after_standstill=ConnectionRestored)

    def _reconnected(self) -> None:
        self._actor.post_anyway(ConnectionRestored())

    # --- leadership, told by the contest

    def begin(self, term: int) -> None:
        """This scheduler leads from now on."""
        self._actor.post_anyway(LeadershipTaken(term))

    def end(self) -> None:
        """It leads no more."""
        self._log.warning("leadership_lost")
        self._actor.post_anyway(LeadershipEnded())

    def stand_by(self) -> None:
        """Another leads."""
        self._log.info("ready", role="standby", policy=self._settings.policy)

    # --- events

    async def _handle(self, event: Event) -> None:
        now_us = self._clock.now_us()
        if isinstance(event, LeadershipTaken) and self._contest.leads():
            self._core = self._new_core(now_us)
            self.herald.begin(self._core, event.term)
            await self._listen()  # before the core asks for reports
        core = self._core
        if core is None or not self._may_decide(event):
            if isinstance(event, OperatorAsked) and event.handle:
                await self._operators.turn_away(event.handle)
            return
        if self._event_log is not None:
            self._event_log.record(event, now_us)
        self._traces.asked(event)
        before_ns, plan_us = time.perf_counter_ns(), core.ledger.plan_us
        commands = core.handle(event, now_us)
        took_s = (time.perf_counter_ns() - before_ns) / 1e9
        self._decision_seconds.labels(type(event).__name__).observe(took_s)
        if core.ledger.plan_us != plan_us:
            self._epoch_seconds.observe(took_s)
            self._packing.look(core, now_us)
        commands = self._pricing.take(commands, now_us)
        if isinstance(event, LeadershipEnded):
            commands += self._pricing.end()
        self.herald.tell(event, commands)
        for command in commands:
            await self._carry_out(command, event)
        await self._follow_up(event)

    def _may_decide(self, event: Event) -> bool:
        """No decision once the lease has run out; no passing of time while nobody can be heard."""
        if isinstance(event, LeadershipEnded):
            return True
        return self._contest.leads() and (self._bus.connected or not isinstance(event, Tick))

    def _new_core(self, now_us: int) -> SchedulerCore:
        settings = self._settings
        policy = make_policy(settings.policy, settings.policy_settings())
        return SchedulerCore(policy, settings.core_settings(), now_us, settings.make_shadow())

    async def _follow_up(self, event: Event) -> None:
        if isinstance(event, LeadershipTaken):
            self._log.info("ready", role="leader", term=event.term, policy=self._settings.policy)
            self._told_to_pause = False
            if self._pause.heard:
                self._actor.post(OperatorAsked("", MovingRequest(paused=True)))
            self._actor.spawn(self._recall_pause())
        elif isinstance(event, LeadershipEnded):
            await self._stop_listening()
            self.herald.end()
            self._packing.forget()
            self._traces.ended()
            self._core = None
        elif isinstance(event, ConnectionRestored) and self._core is not None and self._core.moves_paused:
            self._actor.spawn(self._pause.keep_on())
        elif isinstance(event, Tick) and not self._subscriptions:
            await self._listen()
            self._actor.post(ConnectionRestored())

    async def _listen(self) -> None:
        """Subscribe to everything, or, if the bus is down just now, to nothing: the next tick tries again."""
        handlers = {
            self._subjects.scheduler_events: self._inbox.event,
            self._subjects.place: self._inbox.place,
            self._subjects.admin("*"): self._hear_operator,
        }
        try:
            for subject, handler in handlers.items():
                self._subscriptions.append(await self._bus.subscribe(subject, handler))
        except BusError as error:
            self._log.warning("subscribing_failed", reason=str(error))
            await self._stop_listening()

    async def _hear_operator(self, delivery: Delivery) -> None:
        core = self._core if self._contest.leads() else None
        await self._operators.take(self._inbox.operator(delivery), delivery.reply_to, core)

    async def _stop_listening(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions.clear()

    # --- commands

    async def _carry_out(self, command: Command, cause: Event) -> None:
        match command:
            case Reply():
                self._count(command.reply)
                self._traces.answered(command)
                self._log_decision(command, cause)
                await self._send(command.handle, command.reply)
            case AskReport():
                worker = command.worker
                to = self._subjects.all_workers if worker is None else self._subjects.worker_commands(worker)
                await self._send(to, Report())
            case Announce():
                tell = self._log.warning if command.change in _LOUD else self._log.info
                tell(f"worker_{command.change}", worker=command.worker, reason=command.reason)
            case StartMigration():
                self._start_migration(command)
            case MigrationSettled():
                self._note_settled(command)
            case Answer(handle=""):
                pass  # nobody asked
            case Answer(reply=MovingReply() as told):
                self._told_to_pause = True
                self._actor.spawn(self._keep_pause(command, told))
            case Answer():
                await self._send(command.handle, command.reply)
            case OrderDrain():
                self._order_drain(command)
            case WantGpus():
                self._log.info("gpus_wanted", model=command.model, gpus=command.gpus)

    def _start_migration(self, command: StartMigration) -> None:
        """Ask the source beside all else; what becomes of it comes back as an event."""
        self._tally.moves_begun += 1
        command = self._traces.ordered(command)
        order = command.order.model_dump(exclude={"kind", "traceparent"})
        self._log.info("migration", source=command.source, predicted_us=command.predicted_us, **order)

        async def ask() -> None:
            failed = await self._movers.order(command)
            if failed is not None:
                await self._actor.put(failed)

        self._actor.spawn(ask())

    def _order_drain(self, command: OrderDrain) -> None:
        """Ask the worker beside all else, and tell the operator what it says."""
        self._log.info("drain", worker=command.worker, **command.order.model_dump())

        async def ask() -> None:
            reply = await self._movers.drain(command)
            if isinstance(reply, AdminRefused):
                self._log.warning("drain_refused", worker=command.worker, reason=reply.reason, why=reply.message)
            await self._send(command.handle, reply)

        self._actor.spawn(ask())

    def _note_settled(self, command: MigrationSettled) -> None:
        self._tally.settled(command, self._clock.now_us())
        self._move_metrics.settled(command)
        self._traces.settled(command)
        self._log.info("migration_settled", **asdict(command))

    def _count(self, reply: PlaceReply) -> None:
        match reply:
            case Placed():
                self._tally.placed += 1
            case Queued():
                self._tally.queued += 1
            case Rejected():
                self._tally.rejected[reply.reason] += 1

    def _log_decision(self, command: Reply, cause: Event) -> None:
        fields = command.reply.model_dump(exclude_none=True)
        asked = {}
        if isinstance(cause, PlaceRequested) and cause.request.sequence == command.sequence:
            asked = cause.request.model_dump(exclude={"kind", "sequence", "traceparent"})
        self._log.debug("decision", cause=type(cause).__name__, sequence=command.sequence, **fields, **asked)

    async def _send(self, subject: str, message: Message) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except BusError as error:
            # Whoever waits for it asks again; a worker reports again.
            self._tally.unsent += 1
            self._log.warning("unsent", subject=subject, reason=str(error))

    def _open_event_log(self) -> EventLog | None:
        settings = self._settings
        if settings.event_log is None:
            return None
        header = header_line(settings.policy, settings.policy_settings(), settings.core_settings())
        return EventLog(settings.event_log, header)
