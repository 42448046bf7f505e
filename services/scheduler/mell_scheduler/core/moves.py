"""Moves as operators see them: whether one can be made, how one stands, how one came out."""

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import Migration, SequenceRecord, WorkerRecord
from mell_scheduler.core.values import MigrationSettled
from mell_shared.messages.admin import AdminRefusal, ModeAsked, MoveResult, MoveStatus


class Judge:
    """Says why an operator's move is not made."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def verdict(self, sequence: str, target: WorkerRecord, mode: ModeAsked) -> MoveResult | None:
        """What is to be told instead of moving; None if nothing but room is in the way."""
        record = self._ledger.sequences.get(sequence)
        if record is None:
            return _refused(sequence, "not_running", "it waits for room: nothing of it is anywhere yet")
        if record.migration is not None:
            return self._moving(record, record.migration, target)
        if record.worker is target:
            return MoveResult(sequence=sequence, state="there", message=f"it is on {target.worker_id}")
        return _unfit(record, target) or _unable(record, target, mode)

    def _moving(self, record: SequenceRecord, migration: Migration, target: WorkerRecord) -> MoveResult:
        if migration.target == target.worker_id:
            status = as_status(migration, self._ledger.now_us)
            return MoveResult(sequence=record.sequence, state="moving", move=status)
        return _refused(
            record.sequence, "already_moving", f"it is moving to {migration.target}: ask again when that is over"
        )

    def no_room(self, record: SequenceRecord, target: WorkerRecord) -> MoveResult:
        """The refusal for want of room, in either capacity."""
        free_blocks = max(0, self._ledger.free_blocks(target))
        text = f"it needs {record.size_blocks} KV blocks, {target.worker_id} has {free_blocks} free"
        if free_blocks >= record.size_blocks:
            text = f"{target.worker_id} holds as many sequences as it may"
        return _refused(record.sequence, "no_room", f"{text}; choose another worker")


def _unfit(record: SequenceRecord, target: WorkerRecord) -> MoveResult | None:
    name = record.sequence
    if target.spec.model != record.worker.spec.model:
        text = f"{target.worker_id} serves {target.spec.model}, the request needs {record.worker.spec.model}"
        return _refused(name, "wrong_model", text)
    if target.silent:
        return _refused(name, "silent", f"{target.worker_id} has not reported lately")
    if target.draining:
        return _refused(name, "draining", f"{target.worker_id} is draining: mell undrain it first")
    if record.pending_until_us is not None:
        return _refused(name, "not_running", "its worker has not reported it yet: ask again in a second")
    return None


def _unable(record: SequenceRecord, target: WorkerRecord, mode: ModeAsked) -> MoveResult | None:
    source = record.worker
    if not source.modes or not target.modes:
        unable = source if not source.modes else target
        return _refused(record.sequence, "unsupported", f"{unable.worker_id} ({unable.spec.engine}) moves nothing")
    if source.pool != target.pool:
        text = f"{source.worker_id} and {target.worker_id} differ in KV layout or block size, or have no mode in common"
        return _refused(record.sequence, "unsupported", text)
    if record.waits and (mode not in ("auto", "tokens") or "tokens" not in source.modes):
        text = "it was preempted and holds no KV: it can be moved by tokens only"
        return _refused(record.sequence, "unsupported", text)
    modes = source.modes_to(target)
    if mode != "auto" and mode not in modes:
        text = f"these workers move by {', '.join(modes)}, not by {mode}"
        return _refused(record.sequence, "unsupported", text)
    return None


def _refused(sequence: str, reason: AdminRefusal, message: str) -> MoveResult:
    return MoveResult(sequence=sequence, state="refused", reason=reason, message=f"{sequence}: {message}")


def as_status(migration: Migration, now_us: int) -> MoveStatus:
    """Describe a move under way."""
    transfer = migration.transfer
    return MoveStatus(
        migration=migration.migration,
        sequence=migration.sequence,
        source=migration.source,
        target=migration.target,
        mode=transfer.mode.value,
        reason=transfer.move.reason.name.lower(),
        blocks=transfer.move.size_blocks,
        predicted_s=transfer.predicted_us / 1e6,
        took_s=(now_us - migration.begun_us) / 1e6,
    )


def outcome_status(settled: MigrationSettled, ago_us: int = 0) -> MoveStatus:
    """Describe a move that is over."""
    return MoveStatus(
        migration=settled.migration,
        sequence=settled.sequence,
        source=settled.source,
        target=settled.target,
        mode=settled.mode,
        reason=settled.cause,
        blocks=settled.blocks,
        outcome=settled.outcome,
        why=settled.reason,
        predicted_s=settled.predicted_us / 1e6,
        took_s=settled.took_us / 1e6,
        ago_s=ago_us / 1e6,
        stopped_s=settled.stopped_us / 1e6,
        copied_bytes=settled.copied_bytes,
        copy_s=settled.copy_us / 1e6,
        prefilled_tokens=settled.prefilled_tokens,
        prefill_s=settled.prefill_us / 1e6,
    )


def result_of(settled: MigrationSettled) -> MoveResult:
    """Describe to an asker how a move came out."""
    if settled.outcome == "committed":
        return MoveResult(sequence=settled.sequence, state="committed", move=outcome_status(settled))
    return MoveResult(
        sequence=settled.sequence,
        state="failed",
        reason=settled.outcome if settled.outcome != "failed" else settled.reason.partition(":")[0],
        message=f"{settled.sequence}: {settled.reason}",
        move=outcome_status(settled),
    )
