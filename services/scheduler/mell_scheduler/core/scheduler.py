"""`SchedulerCore`: one event in, commands out. Takes each event to whom it concerns; knows no bus, clock or lease."""

from mell_scheduler.core.admission import Admission
from mell_scheduler.core.completions import Completions
from mell_scheduler.core.dispatch import Dispatcher
from mell_scheduler.core.intake import Intake
from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.liveness import Liveness
from mell_scheduler.core.migrations import Migrations
from mell_scheduler.core.operator import Operator
from mell_scheduler.core.pricing import NEWS_PATIENCE_US, Pricing
from mell_scheduler.core.proof import check_ledger
from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.core.scaling import Scaling
from mell_scheduler.core.shadow import Shadow
from mell_scheduler.core.usage import Usage
from mell_scheduler.core.values import (
    Announce,
    AskReport,
    Change,
    Command,
    ConnectionRestored,
    CoreSettings,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    MigrationPriced,
    MigrationSettled,
    OperatorAsked,
    PlaceRequested,
    Reply,
    Tick,
)
from mell_scheduler.core.waiting import Waiting, WaitingQueue
from mell_scheduler.policy.base import Policy
from mell_shared.messages.base import PROTOCOL_VERSION
from mell_shared.messages.scheduler import (
    LaneMeasured,
    MigrationCommitted,
    MigrationFailed,
    Placed,
    PlaceRequest,
    Queued,
    Rejected,
    SequenceFinished,
    WorkerJoined,
    WorkerLeft,
    WorkerReport,
)

_MOST_RETRY_S = 60
"""What a client is told to wait at most: by then all may be different."""


class SchedulerCore:
    """Places sequences on workers, and moves them between workers, from the moment it leads; built anew for each term.

    `now_us` is the caller's monotonic clock, in microseconds; it must not run backwards between events.
    """

    def __init__(
        self, policy: Policy, settings: CoreSettings, now_us: int, shadow_policy: Policy | None = None
    ) -> None:
        """`shadow_policy` is compared with what is done; it changes no decision."""
        self.settings = settings
        self._policy = policy
        self._shadow = None if shadow_policy is None else Shadow(shadow_policy)
        self.ledger = Ledger(policy, settings, self._shadow)
        self.usage = Usage(self.ledger, self._shadow, now_us)
        self.waiting = WaitingQueue(settings.queue_hold_us, settings.queue_renew_us)
        self.scaling = Scaling(self.ledger, self.waiting, policy)
        self._intake = Intake(self.ledger, policy, settings)
        self._migrations = Migrations(self.ledger, policy, settings)
        self._operator = Operator(self.ledger, self.waiting, policy, self._migrations, settings)
        self._pricing = Pricing(NEWS_PATIENCE_US)
        """For operators: what a move cost belongs into the answer to who ordered it."""
        self._liveness = Liveness(self.ledger, settings)
        self._completions = Completions()
        self._admission = Admission(self.ledger, settings, now_us)
        self._dispatcher = Dispatcher(self.ledger, self.waiting, settings)
        self.heard_all_us = now_us + 2 * settings.report_interval_us
        """From then on everybody who is there should have been heard."""
        self._now_us = self.ledger.now_us = now_us
        self.ledger.plan_us = self.heard_all_us  # never before everybody should have been heard

    @property
    def moves_paused(self) -> bool:
        """Whether an operator wants no moves to be planned."""
        return self._migrations.paused

    def handle(self, event: Event, now_us: int) -> list[Command]:
        """Take one event; return what to do, in order."""
        assert now_us >= self._now_us, "time does not run backwards"
        self._now_us = self.ledger.now_us = now_us
        commands: list[Command]
        match event:
            case WorkerReport():
                commands = self._reported(event)
            case SequenceFinished():
                commands = self._finished(event)
            case PlaceRequested():
                commands = self._asked(event.handle, event.request)
            case Tick():
                commands = self._passed()
            case WorkerJoined():
                commands = self._joined(event)
            case WorkerLeft():
                commands = self._left(event)
            case MigrationCommitted() | MigrationFailed() | LaneMeasured():
                commands = self._heard_of_moving(event)
            case OperatorAsked():
                heard_all = now_us >= self.heard_all_us
                commands = self._operator.ask(event.handle, event.request, now_us, heard_all=heard_all)
            case LeadershipTaken():
                self._migrations.term = event.term
                commands = [AskReport(None)]
            case LeadershipEnded():
                commands = self._ended()
            case ConnectionRestored():
                self._liveness.pardon(now_us)
                commands = [AskReport(None)]
        return self._told_of_moves(commands)

    def _told_of_moves(self, commands: list[Command]) -> list[Command]:
        """Put before what an event causes how moves came out by it, and tell that to whoever ordered them."""
        settled, self.ledger.settled = self.ledger.settled, []
        if settled:
            self._migrations.await_price(settled)
        priced = [command for command in commands if isinstance(command, MigrationPriced)]
        if not (settled or priced or self._pricing.waits):
            return commands
        told = self._pricing.take([*settled, *priced], self._now_us)
        outcomes = [command for command in told if isinstance(command, MigrationSettled)]
        return [*settled, *self._operator.settle(outcomes), *commands]

    def _heard_of_moving(self, event: MigrationCommitted | MigrationFailed | LaneMeasured) -> list[Command]:
        """A move has come out, or could be told better."""
        match event:
            case MigrationCommitted():
                priced = self._migrations.priced(event)
                if priced is not None:
                    return [MigrationPriced(priced)]
                return self._serve_if(self._migrations.committed(event, self._now_us))
            case MigrationFailed():
                return self._serve_if(self._migrations.failed(event, self._now_us))
            case LaneMeasured():
                self._migrations.measured(event)
                return []

    # --- workers

    def _joined(self, event: WorkerJoined) -> list[Command]:
        spec = event.spec
        if spec.worker in self.ledger.workers or self._liveness.left(spec.worker):
            return []
        if abs(spec.protocol - PROTOCOL_VERSION) > 1:
            reason = f"it speaks protocol {spec.protocol}, this scheduler {PROTOCOL_VERSION}: update the older one"
            return [Announce(spec.worker, "refused", reason)]
        worker = self.ledger.join(spec, self._now_us)
        worker.number = self._liveness.last_number(spec.worker)
        return [Announce(spec.worker, "joined", f"serves {spec.model} with {spec.kv_blocks} blocks on {spec.host}")]

    def _left(self, event: WorkerLeft) -> list[Command]:
        worker = self.ledger.workers.get(event.worker)
        self._liveness.bury(event.worker, None if worker is None else worker.number, self._now_us, left=True)
        if worker is None:
            return []
        self.ledger.remove(worker, self._now_us, left=True)
        return [Announce(event.worker, "left", event.reason), *self._serve(worker.spec.model)]

    def _reported(self, report: WorkerReport) -> list[Command]:
        worker = self.ledger.workers.get(report.worker)
        if worker is None:
            return [] if self._liveness.left(report.worker) else [AskReport(report.worker)]
        if report.number <= worker.number:
            return []
        commands = _changes(worker, report)
        self._intake.take(worker, report, self._now_us)
        return commands + self._serve(worker.spec.model)

    def _finished(self, event: SequenceFinished) -> list[Command]:
        worker = self.ledger.workers.get(event.worker)
        if worker is None:
            return []
        self._completions.add(self._now_us)
        self.ledger.finish(worker, event)
        return self._serve(worker.spec.model)

    # --- requests

    def _asked(self, handle: str, request: PlaceRequest) -> list[Command]:
        entry = self.waiting.get(request.sequence)
        if entry is not None and entry.handle == handle:
            return []  # the broker delivered it twice
        if self._overtaken(request, entry):
            return [Reply(handle, request.sequence, Queued(position=0))]
        commands: list[Command] = []
        if entry is not None and entry.handle is not None:
            commands.append(entry.answer(Queued(position=self.waiting.position(entry))))
        answer = self._placed_before(request) or self._admission.refusal(request, self._now_us)
        if answer is None:
            return commands + self._queue(handle, request, entry)
        if entry is not None:
            self.waiting.remove(entry)
        return [
            *commands,
            Reply(handle, request.sequence, answer),
            *self._serve(request.model),
        ]

    def _overtaken(self, request: PlaceRequest, entry: Waiting | None) -> bool:
        """Whether this ask came so late that its frontend has gone on to a newer generation."""
        record = self.ledger.sequences.get(request.sequence)
        newest = max(record.generation if record else 0, entry.request.generation if entry else 0)
        return request.generation < newest

    def _placed_before(self, request: PlaceRequest) -> Placed | None:
        """The first answer, for a repeat. A frontend that asks for something else has given its old place up."""
        record = self.ledger.sequences.get(request.sequence)
        if record is None:
            return None
        if record.generation == request.generation and record.worker.worker_id not in request.excluded:
            return Placed(worker=record.worker.worker_id)
        self.ledger.supersede(record)
        return None

    def _queue(self, handle: str, request: PlaceRequest, entry: Waiting | None) -> list[Command]:
        """Let a request wait in its place, and serve the queue: it may be its turn at once."""
        if entry is not None and (entry.request.model, entry.request.priority) != (request.model, request.priority):
            self.waiting.remove(entry)
            entry = None
        if entry is not None:
            self.waiting.renew(entry, request, handle, self._now_us)
            return self._serve(request.model)
        self.waiting.add(request, handle, self._now_us)
        commands = self._serve(request.model)
        limit = self.settings.queue_limit
        if len(self.waiting) > limit:
            retry_after_s = self._completions.retry_after_s(limit, self._now_us)
            return commands + self._reject(self.waiting.last(), f"{limit} requests wait already", retry_after_s)
        return commands + self._turn_away(request.model)

    def _turn_away(self, model: str) -> list[Command]:
        """Keep a line no longer than what can be served soon: else it would serve those who have long gone."""
        wait_us, most_us = self.waiting.wait_us(model, self._now_us), self.settings.queue_wait_us
        if not most_us or wait_us is None or wait_us <= most_us:
            return []
        wait_s = -(-wait_us // 1_000_000)
        return self._reject(
            self.waiting.of(model)[-1],
            f"the wait for {model!r} would be about {wait_s} s, over the limit of {most_us // 1_000_000}",
            float(min(_MOST_RETRY_S, wait_s)),
        )

    def _reject(self, last: Waiting, message: str, retry_after_s: float) -> list[Command]:
        """Too many wait: the last in order goes; it may be an older one, if the newcomer is more urgent."""
        full = Rejected(reason="queue_full", message=message, retry_after_s=retry_after_s)
        self.waiting.remove(last)
        told: list[Command] = [] if last.handle is None else [last.answer(full)]
        return told + self._serve(last.request.model)

    def _serve(self, model: str) -> list[Command]:
        return self._dispatcher.serve(model, self._now_us)

    def _serve_if(self, model: str | None) -> list[Command]:
        return [] if model is None else self._serve(model)

    # --- time

    def _passed(self) -> list[Command]:
        commands, changed = self._liveness.review(self._now_us)
        changed += self.ledger.expire_pending(self._now_us)
        changed += self._migrations.expire(self._now_us)
        self.ledger.expire_models(self._now_us)
        for entry in self.waiting.forsaken(self._now_us):
            changed.append(entry.request.model)
            self.waiting.remove(entry)
        for model in dict.fromkeys(changed):
            commands += self._serve(model)
        for entry in self.waiting.held_too_long(self._now_us):
            commands.append(entry.answer(Queued(position=self.waiting.position(entry))))
        commands += [*self._operator.passed(self._now_us), *self._epoch()]
        self.usage.passed()
        return commands

    def _epoch(self) -> list[Command]:
        """The moves of an epoch, when one is due, and how many workers there should be."""
        late_us = self._now_us - self.ledger.plan_us
        if late_us < 0:
            return []
        interval_us = self.settings.epoch_us
        self.ledger.plan_us += (late_us // interval_us + 1) * interval_us
        planned = self._migrations.plan(self._now_us)
        self.usage.review(self._now_us)
        return [*planned, *self.scaling.review()]

    def _ended(self) -> list[Command]:
        """Whoever waits asks again at once, and so reaches the next leader."""
        waiting = [entry.answer(Queued(position=self.waiting.position(entry))) for entry in self.waiting.asking()]
        return [*waiting, *self._operator.ended()]

    # --- proof

    def check(self) -> None:
        """Re-derive every index and assert that all agree. For tests; slow."""
        check_ledger(self.ledger, self._policy, self.settings.tpot_target_us)
        if self._shadow is not None:
            self._shadow.check(self.ledger.sequences)
        self.waiting.check()
        assert len(self.waiting) <= self.settings.queue_limit, "the queue is over its bound"
        self._dispatcher.check()


def _changes(worker: WorkerRecord, report: WorkerReport) -> list[Command]:
    """What a report changes about a worker's standing, as seen just before it is taken."""
    commands: list[Command] = []
    if worker.silent:
        commands.append(Announce(worker.worker_id, "heard", "it reports: placements may begin"))
    if report.draining != worker.draining:
        change: Change = "draining" if report.draining else "undrained"
        commands.append(Announce(worker.worker_id, change, "the worker says so"))
    return commands
