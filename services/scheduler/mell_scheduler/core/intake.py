"""What a worker's report changes: sizes, strangers adopted, ends and moves whose news got lost, draining."""

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import STATE_RUNNING, Row, SequenceRecord, WorkerRecord, observe
from mell_scheduler.core.values import CoreSettings
from mell_scheduler.policy.base import Policy
from mell_shared.messages.scheduler import WorkerReport


class Intake:
    """Takes reports into the ledger and the policy."""

    def __init__(self, ledger: Ledger, policy: Policy, settings: CoreSettings) -> None:
        self._ledger = ledger
        self._policy = policy
        self._settings = settings

    def take(self, worker: WorkerRecord, report: WorkerReport, now_us: int) -> None:
        """Take a report that is newer than all before: the worker's state is what it says, plus what is pending."""
        assert report.number > worker.number, "older reports are dropped"
        worker.note(report, now_us)
        # A drained worker is released, and would take no rows; it is drained again below.
        self._ledger.set_draining(worker, draining=False)
        if worker.silent:
            worker.silent = False
            self._policy.resume_gpu(worker.worker_id)
        held_blocks, taken, worker.stale = self._take_rows(worker, report, now_us)
        if taken < len(worker.sequences):
            self._forget_missing(worker, now_us)
        self._share_out(worker, held_blocks + self._covered_blocks(worker, report), self._set_aside(worker, report))
        self._ledger.set_draining(worker, draining=report.draining)
        self._ledger.refresh_closed(worker)

    def _take_rows(
        self, worker: WorkerRecord, report: WorkerReport, now_us: int
    ) -> tuple[int, int, dict[str, tuple[int, int]]]:
        """Update, adopt or set aside each row: all that the scheduler does a hundred thousand times a second.

        Returns the blocks of this worker's records, how many told of themselves, and the stale copies.
        """
        model, horizon = self._ledger.model_of(worker), self._ledger.horizon(worker)
        number, here = report.number, worker.sequences
        stale: dict[str, tuple[int, int]] = {}
        rows: list[Row] = []
        for sequence, generation, tokens, blocks in zip(
            report.sequences, report.generations, report.tokens, report.blocks, strict=True
        ):
            record = here.get(sequence)
            if (
                record is None
                or record.generation != generation
                or record.pending_until_us is not None
                or record.number == number
            ):
                record = self._holder(worker, sequence, generation, now_us)
                if record is None:
                    stale[sequence] = (generation, blocks)
                    continue
            rows.append((record, record.number, tokens, blocks))
            record.number = number
        seen = observe(rows, number, horizon)
        # By the records' ids, not the report's: the policy finds them by identity, without comparing.
        strangers = self._policy.update_gpu(worker.worker_id, seen.sequences, seen.sizes)
        assert not strangers, "the policy and the ledger disagree on what is where"
        if seen.gainers:
            model.learn_growth(seen.gained_tokens // seen.gainers, horizon.limit_tokens)
        return seen.held_blocks, len(rows), stale

    def _holder(self, worker: WorkerRecord, sequence: str, generation: int, now_us: int) -> SequenceRecord | None:
        """The record a row is about; None if a newer generation is known elsewhere: the row is a stale copy."""
        record = self._ledger.sequences.get(sequence)
        if record is not None and record.worker is not worker and generation > record.generation:
            self._found_elsewhere(record, worker, generation, now_us)
            record = self._ledger.sequences.get(sequence)
        if record is not None and record.worker is worker:
            if generation < record.generation or record.number == worker.number:
                return None
            record.generation = generation
            if record.pending_until_us is not None:
                del self._ledger.pending[sequence]
            return record
        return None if record is not None else self._ledger.adopt(worker, sequence, generation)

    def _found_elsewhere(self, record: SequenceRecord, worker: WorkerRecord, generation: int, now_us: int) -> None:
        """A worker reports a newer generation: the move there is done, or somebody submitted it again."""
        migration = record.migration
        if migration is None or migration.target != worker.worker_id:
            self._ledger.supersede(record)
            self._ledger.adopt(worker, record.sequence, generation)
            # Most likely a move that was given up here, and came to its end all the same.
            self._policy.rest(record.sequence)
            return
        source, old = record.worker, (record.generation, record.blocks)
        shared_blocks = source.shared_blocks
        self._ledger.land(record, generation, now_us)
        source.stale[record.sequence] = old  # it may not know yet; its next report tells
        self._ledger.raise_other(source, old[1] - (shared_blocks - source.shared_blocks))
        self._ledger.refresh_closed(source)

    def _forget_missing(self, worker: WorkerRecord, now_us: int) -> None:
        """What the last report told of and this one does not has ended or gone, or moved; the news got lost."""
        gone = [r for r in worker.sequences.values() if r.number != worker.number and r.pending_until_us is None]
        for record in gone:
            if record.migration is None:
                self._ledger.forget(record, "its worker reports it no more: ended, or given back")
            else:
                self._ledger.land(record, record.generation, now_us)

    def _covered_blocks(self, worker: WorkerRecord, report: WorkerReport) -> int:
        """Of what is held there for sequences on their way, as much as their moves are charged with already."""
        if not report.reserved_blocks:
            return 0
        coming = [r for r in self._ledger.moving.values() if r.migration and r.migration.target == worker.worker_id]
        return min(report.reserved_blocks, sum(record.size_blocks for record in coming))

    def _set_aside(self, worker: WorkerRecord, report: WorkerReport) -> int:
        """Blocks that preempted sequences wait for.

        They hold none, and moving them frees none: where they cannot go whoever runs must, so the need is not theirs to
        carry.
        """
        worker.preempted = {}
        for sequence, state in zip(report.sequences, report.states, strict=True) if worker.waiting else ():
            record = worker.sequences.get(sequence)
            if state == STATE_RUNNING or record is None or record.number != worker.number:
                continue
            if record.migration is None:
                worker.preempted[record.sequence] = record.size_blocks - record.blocks
                record.size_blocks = record.blocks
                self._policy.update(record.sequence, record.size_blocks)
        return sum(worker.preempted.values())

    def _share_out(self, worker: WorkerRecord, held_blocks: int, needed_blocks: int) -> None:
        """What is used beyond the records is `other`; what rows count twice is `shared`.

        Where a preempted sequence waits, what it needs counts as used, and what then seems free is withheld: nothing
        else will be let in.
        """
        worker.other_blocks = worker.used_blocks - held_blocks + needed_blocks
        if worker.waiting:
            self._policy.set_other_blocks(worker.worker_id, worker.other_blocks)
            worker.other_blocks += max(0, self._ledger.free_blocks(worker))
        all_rows = held_blocks + sum(blocks for _, blocks in worker.stale.values())
        worker.shared_blocks = max(0, all_rows - worker.used_blocks)
        self._policy.set_other_blocks(worker.worker_id, worker.other_blocks)
