"""The worker's decisions: events in, commands out; no clock, no IO, no engine.

Sequences are admitted only into room there is now, run in continuous batches, and are known until their frontend has
acknowledged the end. Commands are idempotent by (sequence, generation). Whatever a lost message may leave behind,
the status sent to each frontend every second brings to light.
"""

from mell_gpu_worker.core.batching import Batcher
from mell_gpu_worker.core.blocks import BlockPool, root_digest
from mell_gpu_worker.core.commands import Command, PublishEvent, PublishTokens, Reply, Rest, RunStep
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.desk import Desk
from mell_gpu_worker.core.draining import Draining
from mell_gpu_worker.core.estimate import Estimate
from mell_gpu_worker.core.events import (
    BlocksSent,
    CommandReceived,
    ConnectionLost,
    ConnectionRestored,
    EngineAway,
    EngineFailed,
    Event,
    EvictionAnswered,
    EvictionUnanswered,
    FrontendAnswered,
    FrontendUnanswered,
    KvOffered,
    LinkClosed,
    LinkFailed,
    LinkOpened,
    PeerAnswered,
    PeerUnanswered,
    PoolMeasured,
    RoundArrived,
    StatusAnswered,
    StatusUnanswered,
    StepFinished,
    StoodStill,
    StopRequested,
    TimePassed,
)
from mell_gpu_worker.core.farewell import Farewell, Stage
from mell_gpu_worker.core.migration.moves import Moves
from mell_gpu_worker.core.report import Reporter
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.step import StepResult
from mell_gpu_worker.core.streams import Streams
from mell_gpu_worker.core.terms import Terms
from mell_gpu_worker.core.tokens import TokensTable
from mell_gpu_worker.core.watch import FrontendWatch
from mell_shared.messages.scheduler import WorkerJoined
from mell_shared.messages.worker import (
    Cancel,
    CommitMigration,
    Drain,
    ExtendKv,
    Migrate,
    MigrateRefused,
    ReleaseKv,
    Report,
    Resend,
    ReserveKv,
    Submit,
    Undrain,
    WorkerReply,
)

JOIN_EVERY_REPORTS = 10
"""The join is published again with every so many reports, since any one may be lost."""


class WorkerCore:
    """One worker's state. `handle` is the only way to change it; `check` re-derives it."""

    def __init__(self, config: WorkerConfig, now_us: int) -> None:
        spec = config.spec
        self.config = config
        self.streams = Streams(spec.worker, config.frontend_silence_us)
        self.batcher = Batcher(
            BlockPool(spec.kv_blocks, spec.block_tokens, prefix_cache=config.prefix_cache),
            root_digest(spec.model, spec.kv_layout),
            max_step_tokens=config.max_step_tokens,
            max_sequences=spec.max_sequences,
            chunked_prefill=config.can.chunked_prefill,
        )
        self._estimate = Estimate(self.batcher)
        self._residents = Residents(spec.worker, self.batcher, self.streams)
        self._desk = Desk(config, self._residents)
        self._watch = FrontendWatch(self._residents)
        self.moves = Moves(config, self._residents)
        self._farewell = Farewell(self._residents, self._watch, self.moves)
        self._terms = Terms()
        self._drain = Draining(self._residents, self._farewell.evictions, self._terms)
        self._reporter = Reporter(spec.worker)
        self._resting = True
        self._now_us = self._report_us = now_us
        self._status_us = now_us + config.status_interval_us

    @property
    def stage(self) -> Stage:
        """Where in its life the worker is."""
        return self._farewell.stage

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._drain.on or self._estimate.away or self.stage is not Stage.SERVING

    @property
    def wake_us(self) -> int:
        """When `TimePassed` is due at the latest."""
        times = (
            self._report_us,
            self._status_us,
            self._farewell.wake_us,
            self._drain.wake_us,
            self.moves.wake_us,
        )
        return min(time_us for time_us in times if time_us is not None)

    def handle(self, event: Event, now_us: int) -> list[Command]:
        """Take in what happened at `now_us` (never before the last event); return what is to be done, in order.

        A step comes first: the device works while the rest is told.
        """
        assert now_us >= self._now_us, "time runs backwards"
        self._now_us = now_us
        if self.stage is Stage.GONE:
            return []
        commands = self._take(event)
        commands += self._on_time()
        commands += self.moves.proceed(now_us)
        if self.stage is not Stage.SERVING:
            commands += self._farewell.proceed(now_us)
            commands += self.moves.proceed(now_us)
        steps, said = self._next_step()
        return [*steps, *commands, *said]

    def _take(self, event: Event) -> list[Command]:
        said: list[Command] = []
        match event:
            case PeerAnswered() | PeerUnanswered() | FrontendAnswered() | FrontendUnanswered():
                said = self.moves.take(event, self._now_us)
            case KvOffered() | RoundArrived() | LinkOpened() | BlocksSent() | LinkFailed() | LinkClosed():
                said = self.moves.take_link(event, self._now_us)
            case (
                ConnectionLost() | ConnectionRestored() | StoodStill() | StopRequested() | EngineFailed() | EngineAway()
            ):
                said = self._surroundings(event)
            case StepFinished(result):
                said = self._take_step(result)
            case CommandReceived():
                said = self._obey(event)
            case StatusAnswered():
                said = self._watch.take(event, self._now_us)
            case StatusUnanswered(frontend):
                self._watch.miss(frontend, self._now_us)
            case EvictionAnswered(sequence, generation):
                self._farewell.evictions.answered(sequence, generation)
            case EvictionUnanswered(sequence, generation):
                again = self._farewell.evictions.unanswered(sequence, generation)
                said = [again] if again else []
            case PoolMeasured():
                said = self._take_measure(event)
            case TimePassed():
                pass
        return said

    def _surroundings(
        self, event: ConnectionLost | ConnectionRestored | StoodStill | StopRequested | EngineFailed | EngineAway
    ) -> list[Command]:
        said: list[Command] = []
        match event:
            case ConnectionLost():
                self._watch.disconnect()
            case ConnectionRestored():
                said = self._announce() + self._watch.reconnect(self._now_us)
            case StoodStill():
                self._watch.stood_still(self._now_us)
            case StopRequested():
                said = self._stop()
            case EngineFailed(message):
                self._close(closed=True)
                said = self._farewell.fail(message, self._now_us)
            case EngineAway():
                said = self._give_all_back()
        return said

    def _give_all_back(self) -> list[Command]:
        """The engine is away: whatever is here goes on elsewhere, and nothing new is taken until it is back."""
        if self._estimate.away or self.stage not in (Stage.SERVING, Stage.STOPPING):
            return []
        self._estimate.away = True
        self._close(closed=True)
        said = self.moves.target.abandon(self._now_us, "its engine is away")
        said += self._farewell.evictions.give_back(self._residents, self._now_us)
        return said + self._report(join=False)

    def _take_measure(self, measured: PoolMeasured) -> list[Command]:
        was_away = self._estimate.away
        self._estimate.take(measured)
        if measured.step_us:
            self._reporter.decode_took(measured.step_us)
        self._close(closed=self.draining)
        return self._report(join=False) if was_away else []

    def _obey(self, event: CommandReceived) -> list[Command]:
        command = event.command
        reply: WorkerReply | None
        match command:
            case Submit():
                reply, said = self._desk.submit(command, event.grammar_fault, self._now_us)
            case Cancel():
                reply, said = self._desk.cancel(command, self._now_us)
            case Resend():
                reply, said = self._desk.resend(command)
            case Migrate():
                reply, said = self._migrate(command)
            case ReserveKv() | ExtendKv() | CommitMigration() | ReleaseKv():
                reply, said = self.moves.asked(command, event.reply_to, event.grammar_fault, self._now_us)
            case Drain() | Undrain():
                reply = self._drain.obey(command, self._now_us, stopping=self.stage is not Stage.SERVING)
                self._close(closed=self.draining)
                said = self._report(join=False)
            case Report():
                return self._announce()
        # The reply first: a submission is accepted before its tokens come.
        return [Reply(event.reply_to, reply), *said] if event.reply_to and reply else said

    def _migrate(self, order: Migrate) -> tuple[WorkerReply, list[Command]]:
        if not self._terms.admits(order.term):
            text = self._terms.refusal(order.term)
            return MigrateRefused(reason="term", message=text, term=self._terms.highest), []
        if self.stage not in (Stage.SERVING, Stage.STOPPING):
            return MigrateRefused(reason="stopping", message="this worker ends", term=self._terms.highest), []
        reply, said = self.moves.order(order, self._now_us)
        if isinstance(reply, MigrateRefused):
            reply = reply.model_copy(update={"term": self._terms.highest})
        return reply, said

    def _close(self, *, closed: bool) -> None:
        """Take nothing new, or again."""
        self._desk.closed = self.moves.target.closed = closed

    def _next_step(self) -> tuple[list[Command], list[Command]]:
        """Return the next step, or that there is none for now, and what the planning of it has brought up."""
        if self.stage not in (Stage.SERVING, Stage.STOPPING) or self.batcher.computing:
            return [], []
        rows = self.batcher.plan()
        # Who had to give way for it is noticed at once, so that blocks still lent come free.
        said = self.moves.proceed(self._now_us)
        if rows:
            self._resting = False
            return [RunStep(tuple(rows))], said
        if self.config.can.own_pace and not self._resting:
            self._resting = True
            return [Rest()], said
        return [], said

    def _take_step(self, result: StepResult) -> list[Command]:
        progress = self.batcher.commit(result)
        self._residents.stepped_us = self._now_us
        if self.batcher.decodes_only and not self.config.can.own_pace:
            self._reporter.decode_took(result.step_us)
        said: list[Command] = []
        tables: dict[str, TokensTable] = {}
        for sequence, sampled, end in progress:
            if sequence.unclaimed:
                sequence.finish_reason = end
                continue
            if end is not None:
                said.append(self._residents.finish(sequence, end))
            elif not sampled:
                continue
            table = tables.get(sequence.frontend)
            if table is None:
                table = tables[sequence.frontend] = TokensTable()
            outputs = len(sequence.token_ids) - sequence.prompt_tokens
            table.add(sequence, outputs - sampled, outputs)
        worker = self.config.spec.worker
        return said + [PublishTokens(frontend, table.message(worker)) for frontend, table in tables.items()]

    def _on_time(self) -> list[Command]:
        said = self._drain.proceed(self._now_us)
        if said or self._now_us >= self._report_us:
            self._report_us = _next(self._report_us, self._now_us, self.config.report_interval_us)
            said += self._report(join=self._reporter.number % JOIN_EVERY_REPORTS == 0)
        if self._now_us >= self._status_us:
            self._status_us = _next(self._status_us, self._now_us, self.config.status_interval_us)
            said += self._watch.round(self._now_us)
        return said

    def _announce(self) -> list[Command]:
        return self._report(join=True)

    def _report(self, *, join: bool) -> list[Command]:
        report: Command = PublishEvent(self._reporter.report(self.batcher, draining=self.draining))
        return [PublishEvent(WorkerJoined(spec=self.config.spec)), report] if join else [report]

    def _stop(self) -> list[Command]:
        if self.stage is not Stage.SERVING:
            return []
        self._close(closed=True)
        self._farewell.begin(self._now_us + self.config.stop_deadline_us)
        return self._report(join=False)

    def check(self) -> None:
        """Assert that all parts agree with each other."""
        self._residents.check()
        self.moves.check()


def _next(due_us: int, now_us: int, interval_us: int) -> int:
    """Return the first time after `now_us` on the rhythm that `due_us` is on."""
    return due_us + ((now_us - due_us) // interval_us + 1) * interval_us
