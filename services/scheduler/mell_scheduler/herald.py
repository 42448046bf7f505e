"""Tells other systems what the scheduler decides and sees: the core's commands and its workers' standing as events."""

from mell_scheduler.core import (
    Announce,
    Command,
    Event,
    MigrationSettled,
    Reply,
    SchedulerCore,
    WantGpus,
)
from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.metrics import failure
from mell_shared.events.data import (
    EventData,
    GpusWanted,
    MigrationFailed,
    ModelFacts,
    RequestMigrated,
    RequestPlaced,
    SchedulerState,
    WorkerActive,
    WorkerDrained,
    WorkerDraining,
    WorkerEvent,
    WorkerFacts,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorkerSilent,
    WorkerStandby,
)
from mell_shared.events.outbox import Emit
from mell_shared.messages.scheduler import Placed, SequenceFinished, WorkerReport

_MOST_WORKERS = 2_000
"""Rows of a state; a message has its limit."""

_STANDINGS: dict[str, type[WorkerEvent]] = {
    "active": WorkerActive,
    "standby": WorkerStandby,
    "draining": WorkerDraining,
    "drained": WorkerDrained,
    "silent": WorkerSilent,
}


class Herald:
    """Emits what follows from each event of the core. Of each worker it keeps the standing told last, no more."""

    def __init__(self, emit: Emit, policy: str) -> None:
        self._emit = emit
        self._policy = policy
        self._core: SchedulerCore | None = None
        self._term = 0
        self._told: dict[str, str] = {}

    def begin(self, core: SchedulerCore, term: int) -> None:
        """This scheduler leads, with a new core that knows nothing yet."""
        self._core, self._term = core, term
        self._told.clear()
        self._emit(state_of(core, term, self._policy))

    def end(self) -> None:
        """It leads no more."""
        self._core = None

    def state(self) -> SchedulerState | None:
        """How things stand; None while another leads."""
        return None if self._core is None else state_of(self._core, self._term, self._policy)

    def tell(self, event: Event, commands: list[Command]) -> None:
        """Emit what came of an event."""
        core = self._core
        if core is None:
            return
        if isinstance(event, WorkerReport | SequenceFinished):
            self._tell_standing(core, event.worker)
        for command in commands:
            match command:
                case Reply(reply=Placed()):
                    self._tell_placed(core, command.sequence)
                case MigrationSettled():
                    self._emit(_move(core, command))
                    self._tell_standing(core, command.source)
                    self._tell_standing(core, command.target)
                case Announce():
                    self._tell_announced(core, command)
                case WantGpus():
                    self._emit(GpusWanted(model=command.model, gpus=command.gpus))
                case _:
                    pass

    def _tell_placed(self, core: SchedulerCore, sequence: str) -> None:
        """A repeat of an answer places nothing: then nothing was written of the sequence just now."""
        record, chronicle = core.ledger.sequences.get(sequence), core.ledger.history.get(sequence)
        if record is None or chronicle is None:
            return
        page = chronicle.pages[-1]
        if page.what != "placed" or page.at_us != core.ledger.now_us:
            return
        self._emit(
            RequestPlaced(
                sequence=sequence,
                request_id=chronicle.request_id,
                model=chronicle.model,
                worker=page.worker,
                generation=page.generation,
                prompt_tokens=record.tokens,
                waited_s=page.waited_us / 1e6,
            )
        )
        self._tell_standing(core, page.worker)

    def _tell_announced(self, core: SchedulerCore, command: Announce) -> None:
        worker = core.ledger.workers.get(command.worker)
        match command.change:
            case "joined" if worker is not None:
                self._emit(_joined(worker))
            case "left" | "lost":
                self._told.pop(command.worker, None)
                kind = WorkerLeft if command.change == "left" else WorkerLost
                self._emit(kind(worker=command.worker, reason=command.reason))
            case _:
                pass
        self._tell_standing(core, command.worker)

    def _tell_standing(self, core: SchedulerCore, name: str) -> None:
        worker = core.ledger.workers.get(name)
        if worker is None:
            return
        standing = core.ledger.standing(worker)
        if self._told.get(name) == standing:
            return
        if standing == "silent" and name not in self._told:
            return  # it has only just joined, and not reported yet
        self._told[name] = standing
        spec = worker.spec
        self._emit(_STANDINGS[standing](worker=name, name=spec.name, model=spec.model))


def state_of(core: SchedulerCore, term: int, policy: str) -> SchedulerState:
    """Return the cluster as the core sees it."""
    workers = list(core.ledger.workers.values())
    return SchedulerState(
        term=term,
        policy=policy,
        workers=tuple(_facts(core, worker) for worker in workers[:_MOST_WORKERS]),
        workers_left_out=max(0, len(workers) - _MOST_WORKERS),
        models=tuple(ModelFacts(model=name, gpus_wanted=gpus) for name, gpus in core.scaling.wanted.items()),
        queued=len(core.waiting),
        sequences=len(core.ledger.sequences),
        migrating=len(core.ledger.moving),
    )


def _facts(core: SchedulerCore, worker: WorkerRecord) -> WorkerFacts:
    return WorkerFacts(
        worker=worker.worker_id,
        name=worker.spec.name,
        model=worker.spec.model,
        state=core.ledger.standing(worker),
        kv_blocks=worker.spec.kv_blocks,
        used_blocks=worker.used_blocks,
        sequences=worker.load,
    )


def _joined(worker: WorkerRecord) -> WorkerJoined:
    spec = worker.spec
    return WorkerJoined(
        worker=spec.worker,
        name=spec.name,
        model=spec.model,
        host=spec.host,
        engine=spec.engine,
        device=spec.device,
        kv_blocks=spec.kv_blocks,
        block_tokens=spec.block_tokens,
    )


def _move(core: SchedulerCore, move: MigrationSettled) -> EventData:
    chronicle = core.ledger.history.get(move.sequence)
    what = {
        "sequence": move.sequence,
        "request_id": chronicle.request_id if chronicle else "",
        "model": chronicle.model if chronicle else "",
        "migration": move.migration,
        "source": move.source,
        "target": move.target,
        "mode": move.mode,
        "cause": move.cause,
        "blocks": move.blocks,
        "predicted_s": move.predicted_us / 1e6,
        "took_s": move.took_us / 1e6,
    }
    if move.outcome != "committed":
        return MigrationFailed.model_validate({**what, "outcome": move.outcome, "reason": failure(move)})
    cost = {
        "stopped_s": move.stopped_us / 1e6,
        "copied_bytes": move.copied_bytes,
        "copy_s": move.copy_us / 1e6,
        "prefilled_tokens": move.prefilled_tokens,
        "prefill_s": move.prefill_us / 1e6,
    }
    return RequestMigrated.model_validate({**what, **cost})
