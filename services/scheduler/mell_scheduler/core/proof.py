"""Re-derives the ledger's every index and asserts that it agrees with the policy. For tests; slow."""

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.policy.base import GpuState, Policy


def check_ledger(ledger: Ledger, policy: Policy, tpot_target_us: int) -> None:
    """Assert that workers, sequences, pending placements and moves are what the policy holds."""
    policy.check()
    assert list(ledger.workers) == policy.gpu_ids(), "workers and GPUs differ"
    for name, record in ledger.sequences.items():
        assert record.worker.sequences[name] is record
        assert policy.gpu_of(name) == record.worker.worker_id
    assert sum(len(w.sequences) for w in ledger.workers.values()) == len(ledger.sequences)
    _check_pending(ledger)
    _check_moves(ledger, policy)
    for worker in ledger.workers.values():
        _check_worker(ledger, policy, worker, tpot_target_us)


def _check_pending(ledger: Ledger) -> None:
    pending = {name for name, record in ledger.sequences.items() if record.pending_until_us is not None}
    assert set(ledger.pending) == pending, "pending index out of step"
    deadlines = [record.pending_until_us or 0 for record in ledger.pending.values()]
    assert deadlines == sorted(deadlines), "pending placements out of order"


def _check_moves(ledger: Ledger, policy: Policy) -> None:
    moving = {name for name, record in ledger.sequences.items() if record.migration is not None}
    assert set(ledger.moving) == moving, "index of moves out of step"
    deadlines = []
    for name, record in ledger.sequences.items():
        migration = record.migration
        assert policy.moving_to(name) == (migration.target if migration else None), "another move than the policy's"
        if migration is not None:
            assert migration.source == record.worker.worker_id
            source, target = record.worker, ledger.workers[migration.target]
            assert source.pool == target.pool, "a move between pools"
            assert source.modes, "a move of what cannot be moved"
    deadlines = [record.migration.deadline_us for record in ledger.moving.values() if record.migration]
    assert deadlines == sorted(deadlines), "moves out of order"


def _check_worker(ledger: Ledger, policy: Policy, worker: WorkerRecord, tpot_target_us: int) -> None:
    model = ledger.model_of(worker)
    assert model.workers[worker.worker_id] is worker
    assert (worker.worker_id in model.closed) == worker.closed(tpot_target_us)
    incoming = [r for r in ledger.moving.values() if r.migration and r.migration.target == worker.worker_id]
    charged = sum(record.size_blocks for record in [*worker.sequences.values(), *incoming]) + worker.other_blocks
    assert policy.used_blocks(worker.worker_id) == charged, "the policy charges something else"
    draining = policy.state(worker.worker_id) in (GpuState.DRAINING, GpuState.RELEASED)
    assert draining == worker.draining
