"""The cluster as the core sees it, as operators read it."""

from collections import Counter
from typing import Any

from mell_scheduler.core.moves import as_status
from mell_scheduler.core.records import SequenceRecord, WorkerRecord
from mell_scheduler.core.scheduler import SchedulerCore
from mell_scheduler.core.waiting import Waiting
from mell_shared.messages.admin import NOWHERE, SEQUENCE_STATES, MoveStatus, SequenceStatus, WorkerStatus

MOST_SEQUENCES = 5_000
"""Rows of a status; a message has its limit."""

_RANKS = {state: rank for rank, state in enumerate(SEQUENCE_STATES)}


def worker_statuses(core: SchedulerCore, now_us: int) -> tuple[WorkerStatus, ...]:
    """Return every worker, in order of joining."""
    moving = [record.migration for record in core.ledger.moving.values() if record.migration is not None]
    leaving, coming = Counter(m.source for m in moving), Counter(m.target for m in moving)
    return tuple(
        _status(core, worker, now_us).model_copy(
            update={"leaving": leaving[worker.worker_id], "coming": coming[worker.worker_id]}
        )
        for worker in core.ledger.workers.values()
    )


def move_statuses(core: SchedulerCore, now_us: int) -> tuple[MoveStatus, ...]:
    """Return every move under way, in order of beginning."""
    records = core.ledger.moving.values()
    return tuple(as_status(record.migration, now_us) for record in records if record.migration is not None)


def sequence_statuses(core: SchedulerCore) -> tuple[SequenceStatus, ...]:
    """Return every sequence, worker by worker, then those that wait."""
    placed = [_placed(core, record) for worker in core.ledger.workers.values() for record in worker.sequences.values()]
    return (*placed, *(_waiting(entry) for entry in core.waiting.everybody()))


def _placed(core: SchedulerCore, record: SequenceRecord) -> SequenceStatus:
    chronicle = core.ledger.history.get(record.sequence)
    return SequenceStatus(
        sequence=record.sequence,
        request_id=chronicle.request_id if chronicle else "",
        state=record.state,
        worker=record.worker.worker_id,
        target=record.migration.target if record.migration else "",
        tokens=record.tokens,
        blocks=record.blocks,
        moves=chronicle.moves if chronicle else 0,
    )


def _waiting(entry: Waiting) -> SequenceStatus:
    request = entry.request
    return SequenceStatus(
        sequence=request.sequence, request_id=request.request_id, state="waiting", tokens=request.prompt_tokens
    )


def _status(core: SchedulerCore, worker: WorkerRecord, now_us: int) -> WorkerStatus:
    spec = worker.spec
    return WorkerStatus(
        worker=spec.worker,
        name=spec.name,
        host=spec.host,
        model=spec.model,
        engine=spec.engine,
        device=spec.device,
        state=core.ledger.standing(worker),
        kv_blocks=spec.kv_blocks,
        used_blocks=worker.used_blocks,
        block_tokens=spec.block_tokens,
        running=worker.running,
        waiting=worker.waiting,
        step_us=worker.step_us,
        report_age_s=(now_us - worker.heard_us) / 1_000_000,
        sequences=worker.load,
        migration_modes=worker.modes,
        kv_bytes_per_token=spec.kv_bytes_per_token,
    )


def live_columns(core: SchedulerCore) -> dict[str, Any]:
    """Return the sequences as the columns of a `Live`, in the order of `sequence_statuses`.

    One that no report tells of yet has the blocks that its tokens will need.
    """
    positions = {name: position for position, name in enumerate(core.ledger.workers)}
    rows = [
        (
            record.sequence,
            positions[record.worker.worker_id],
            positions[record.migration.target] if record.migration else NOWHERE,
            record.tokens,
            record.blocks or -(-record.tokens // record.worker.block_tokens),
            _RANKS[record.state],
        )
        for worker in core.ledger.workers.values()
        for record in worker.sequences.values()
    ]
    waiting = [
        (entry.request.sequence, NOWHERE, NOWHERE, entry.request.prompt_tokens, 0, _RANKS["waiting"])
        for entry in core.waiting.everybody()
    ]
    if not rows and not waiting:
        return {}
    sequences, *columns = zip(*(rows + waiting)[:MOST_SEQUENCES], strict=True)
    names = ("workers", "targets", "tokens", "blocks", "states")
    return {"sequences": sequences, **{name: list(column) for name, column in zip(names, columns, strict=True)}}
