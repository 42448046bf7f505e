"""`SchedulerCore`: one event in, commands out. Owns placement and the waiting queue; knows no bus, clock or lease.

The queue's rule: a model's requests are tried in order (priority, time waited), and only one that somebody asks for
right now is placed. The first that is not placed *claims* a worker: nothing behind it is placed there until the
claimant is placed or gone. So later requests may use room elsewhere if they are smaller than all that wait before
them, and none can starve one before it.
"""

from mell_scheduler.core.completions import Completions
from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.liveness import Liveness
from mell_scheduler.core.records import ModelRecord, WorkerRecord
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
    PlaceRequested,
    Reply,
    Tick,
)
from mell_scheduler.core.waiting import Waiting, WaitingQueue
from mell_scheduler.policy.base import Policy
from mell_shared.messages.base import PROTOCOL_VERSION
from mell_shared.messages.scheduler import (
    Placed,
    PlaceReply,
    PlaceRequest,
    Queued,
    Rejected,
    SequenceFinished,
    WorkerJoined,
    WorkerLeft,
    WorkerReport,
)


class SchedulerCore:
    """Places sequences on workers, from the moment it leads; built anew for each term.

    `now_us` is the caller's monotonic clock, in microseconds; it must not run backwards between events.
    """

    def __init__(self, policy: Policy, settings: CoreSettings, now_us: int) -> None:
        self.settings = settings
        self.ledger = Ledger(policy, settings)
        self.waiting = WaitingQueue(settings.queue_hold_us, settings.queue_renew_us)
        self._liveness = Liveness(self.ledger, settings)
        self._completions = Completions()
        self._claims: dict[str, tuple[str, str]] = {}
        """Model -> the first waiting sequence that found no room, and the worker kept for it."""
        self._started_us = now_us
        self._now_us = now_us

    def handle(self, event: Event, now_us: int) -> list[Command]:
        """Take one event; return what to do, in order."""
        assert now_us >= self._now_us, "time does not run backwards"
        self._now_us = now_us
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
            case LeadershipTaken():
                commands = [AskReport(None)]
            case LeadershipEnded():
                commands = self._ended()
            case ConnectionRestored():
                self._liveness.pardon(now_us)
                commands = [AskReport(None)]
        return commands

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
        self.ledger.remove(worker, self._now_us)
        return [Announce(event.worker, "left", event.reason), *self._serve(worker.spec.model)]

    def _reported(self, report: WorkerReport) -> list[Command]:
        worker = self.ledger.workers.get(report.worker)
        if worker is None:
            return [] if self._liveness.left(report.worker) else [AskReport(report.worker)]
        if report.number <= worker.number:
            return []
        commands = _changes(worker, report)
        self.ledger.report(worker, report, self._now_us)
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
            commands.append(self._reply(entry, Queued(position=self.waiting.position(entry))))
        answer = self._placed_before(request) or self._refusal(request)
        if answer is None:
            return commands + self._queue(handle, request, entry)
        if entry is not None:
            self.waiting.remove(entry)
        return [*commands, Reply(handle, request.sequence, answer), *self._serve(request.model)]

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

    def _refusal(self, request: PlaceRequest) -> Rejected | None:
        """Why a request can never be placed, as far as is known; None while that may still change."""
        now_us, settings = self._now_us, self.settings
        settled = now_us >= self._started_us + 2 * settings.report_interval_us
        model = self.ledger.models.get(request.model)
        if model is not None and model.workers:
            return _too_large(request, model) if settled else None
        since_us = self._started_us if model is None else max(self._started_us, model.absent_since_us)
        if not settled or now_us < since_us + settings.worker_grace_us:
            return None
        return self._absent(request)

    def _absent(self, request: PlaceRequest) -> Rejected:
        served = [name for name, model in self.ledger.models.items() if model.workers]
        if served:
            known = ", ".join(sorted(served))
            return Rejected(reason="unknown_model", message=f"no worker serves {request.model!r}; served: {known}")
        retry_after_s = max(1.0, self.settings.worker_grace_us / 1_000_000)
        return Rejected(reason="no_worker", message="no worker is up", retry_after_s=retry_after_s)

    def _queue(self, handle: str, request: PlaceRequest, entry: Waiting | None) -> list[Command]:
        """Let a request wait in its place, and serve the queue: it may be its turn at once."""
        if entry is not None and (entry.request.model, entry.request.priority) != (request.model, request.priority):
            self.waiting.remove(entry)
            entry = None
        if entry is None:
            self.waiting.add(request, handle, self._now_us)
        else:
            self.waiting.renew(entry, request, handle, self._now_us)
        commands = self._serve(request.model)
        if len(self.waiting) > self.settings.queue_limit:
            commands += self._reject(self.waiting.last())
        return commands

    def _reject(self, last: Waiting) -> list[Command]:
        """The queue is full: the last in order goes; it may be an older one, if the newcomer is more urgent."""
        limit = self.settings.queue_limit
        retry_after_s = self._completions.retry_after_s(limit, self._now_us)
        full = Rejected(reason="queue_full", message=f"{limit} requests wait already", retry_after_s=retry_after_s)
        self.waiting.remove(last)
        told: list[Command] = [] if last.handle is None else [self._reply(last, full)]
        return told + self._serve(last.request.model)

    # --- the queue

    def _serve(self, name: str) -> list[Command]:
        """Place what now finds room of a model's first waiting requests; the first that does not claims a worker."""
        model = self.ledger.models.get(name)
        if model is None or not model.workers:
            self._claims.pop(name, None)
            return []
        commands: list[Command] = []
        claimed: str | None = None
        unplaced_tokens: int | None = None
        """The smallest that found no room or is not asked for now: none as large is placed behind it."""
        for entry in self.waiting.first(name, self.settings.overtake_window):
            tokens = self.ledger.predicted_tokens(entry.request)
            worker = None
            if unplaced_tokens is None or tokens < unplaced_tokens:
                unfit = _unfit(entry.request, model)
                if entry.handle is not None:
                    worker = self._place(entry, {*model.closed, *unfit, claimed or ""})
                if entry.handle is None or (worker is None and not unfit):
                    unplaced_tokens = tokens
            if worker is not None:
                commands.append(self._reply(entry, Placed(worker=worker)))
                self.waiting.remove(entry)
            elif claimed is None:
                claimed = self._claim(entry, model)
        if claimed is None:
            self._claims.pop(name, None)
        return commands

    def _place(self, entry: Waiting, barred: set[str]) -> str | None:
        """The worker for a request that is asked for now; None if there is no room."""
        request = entry.request
        record = self.ledger.sequences.get(request.sequence)
        runs = record is not None and record.generation >= request.generation
        if record is not None and runs and record.worker.worker_id not in request.excluded:
            return record.worker.worker_id  # a report says so: an earlier leader placed it
        worker = self.ledger.place(request, barred, self._now_us + self.settings.submit_timeout_us)
        return None if worker is None else worker.worker_id

    def _claim(self, entry: Waiting, model: ModelRecord) -> str:
        """The worker kept for the first in line, "" if none could take it. Kept until it is of no use any more.

        Chosen once, as the one with the most free blocks: a claim that wandered with every report would let each
        worker fill up again in its turn.
        """
        unfit = _unfit(entry.request, model)
        sequence = entry.request.sequence
        claimant, kept = self._claims.get(model.name, ("", ""))
        if claimant == sequence and kept not in unfit and kept in model.workers and model.workers[kept].usable:
            return kept
        usable = [worker for name, worker in model.workers.items() if name not in unfit and worker.usable]
        if not usable:
            self._claims.pop(model.name, None)
            return ""
        best = max(usable, key=self.ledger.free_blocks)
        self._claims[model.name] = (sequence, best.worker_id)
        return best.worker_id

    def _reply(self, entry: Waiting, reply: PlaceReply) -> Reply:
        assert entry.handle is not None, "somebody asks"
        handle, entry.handle = entry.handle, None
        return Reply(handle, entry.request.sequence, reply)

    # --- time

    def _passed(self) -> list[Command]:
        commands, changed = self._liveness.review(self._now_us)
        changed += self.ledger.expire_pending(self._now_us)
        self.ledger.expire_models(self._now_us)
        for entry in self.waiting.forsaken(self._now_us):
            changed.append(entry.request.model)
            self.waiting.remove(entry)
        for model in dict.fromkeys(changed):
            commands += self._serve(model)
        for entry in self.waiting.held_too_long(self._now_us):
            commands.append(self._reply(entry, Queued(position=self.waiting.position(entry))))
        return commands

    def _ended(self) -> list[Command]:
        """Whoever waits asks again at once, and so reaches the next leader."""
        return [self._reply(entry, Queued(position=self.waiting.position(entry))) for entry in self.waiting.asking()]

    # --- proof

    def check(self) -> None:
        """Re-derive every index and assert that all agree. For tests; slow."""
        self.ledger.check()
        self.waiting.check()
        assert len(self.waiting) <= self.settings.queue_limit, "the queue is over its bound"
        for name, (sequence, worker) in self._claims.items():
            entry = self.waiting.get(sequence)
            assert entry is not None, "a claim outlived its claimant"
            assert entry.request.model == name
            assert self.ledger.models[name].workers[worker].usable, "a claim on a worker that takes nothing"


def _total_tokens(request: PlaceRequest) -> int:
    """What the request needs room for in the end; without an output limit, for one token at least."""
    return request.prompt_tokens + (request.max_output_tokens or 1)


def _too_large(request: PlaceRequest, model: ModelRecord) -> Rejected | None:
    limit = model.limit_tokens
    total = _total_tokens(request)
    if total <= limit:
        return None
    message = f"{total} tokens of prompt and output; no worker of {model.name!r} holds more than {limit}"
    return Rejected(reason="too_large", message=message, limit_tokens=limit)


def _unfit(request: PlaceRequest, model: ModelRecord) -> list[str]:
    """Workers that must not get this request: they refused it, or could never hold it."""
    total = _total_tokens(request)
    if total <= model.least_total_tokens:
        return list(request.excluded)
    small = [name for name, worker in model.workers.items() if worker.spec.max_total_tokens < total]
    return [*request.excluded, *small]


def _changes(worker: WorkerRecord, report: WorkerReport) -> list[Command]:
    """What a report changes about a worker's standing, as seen just before it is taken."""
    commands: list[Command] = []
    if worker.silent:
        commands.append(Announce(worker.worker_id, "heard", "it reports: placements may begin"))
    if report.draining != worker.draining:
        change: Change = "draining" if report.draining else "undrained"
        commands.append(Announce(worker.worker_id, change, "the worker says so"))
    return commands
