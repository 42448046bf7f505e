"""Drains: the order to the worker, and the plan of where its sequences would go."""

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.migrations import Migrations
from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.core.values import Answer, Command, Handle, OrderDrain
from mell_scheduler.policy.base import Policy
from mell_shared.messages.admin import DrainReply, DrainRequest, DrainRow, UndrainRequest
from mell_shared.messages.worker import Drain, Undrain


class Drains:
    """Keeps nothing: a worker says by itself that it drains, to this leader and to the next."""

    def __init__(self, ledger: Ledger, policy: Policy, migrations: Migrations) -> None:
        self._ledger = ledger
        self._policy = policy
        self._migrations = migrations

    def order(self, handle: Handle, request: DrainRequest | UndrainRequest, worker: WorkerRecord) -> Command:
        """What to send and to answer; of a rehearsal only the plan."""
        if isinstance(request, UndrainRequest):
            reply = DrainReply(worker=worker.worker_id, name=worker.spec.name, draining=False)
            return OrderDrain(worker.worker_id, Undrain(term=self._migrations.term), handle, reply)
        reply = DrainReply(
            worker=worker.worker_id,
            name=worker.spec.name,
            draining=True,
            dry_run=request.dry_run,
            deadline_s=request.deadline_s,
            sequences=self._plan(worker),
        )
        if request.dry_run:
            return Answer(handle, reply)
        order = Drain(term=self._migrations.term, deadline_s=request.deadline_s)
        return OrderDrain(worker.worker_id, order, handle, reply)

    def _plan(self, worker: WorkerRecord) -> tuple[DrainRow, ...]:
        rehearsed = self._policy.rehearse_drain(worker.worker_id)
        paused = self._migrations.paused
        return tuple(self._row(worker, sequence, None if paused else target) for sequence, target in rehearsed)

    def _row(self, worker: WorkerRecord, sequence: str, target: str | None) -> DrainRow:
        blocks = self._ledger.sequences[sequence].size_blocks
        if target is not None:
            return DrainRow(sequence=sequence, blocks=blocks, target=target)
        return DrainRow(sequence=sequence, blocks=blocks, why=self._why_it_stays(worker))

    def _why_it_stays(self, worker: WorkerRecord) -> str:
        if not worker.modes:
            return "this worker moves nothing: it ends here"
        return "moves are paused: mell moves resume" if self._migrations.paused else "no other worker has room now"
