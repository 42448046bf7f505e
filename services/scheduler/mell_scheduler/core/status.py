"""The cluster as the core sees it, as operators read it."""

from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.core.scheduler import SchedulerCore
from mell_shared.messages.admin import WorkerStatus


def worker_statuses(core: SchedulerCore, now_us: int) -> tuple[WorkerStatus, ...]:
    """Return every worker, in order of joining."""
    return tuple(_status(core, worker, now_us) for worker in core.ledger.workers.values())


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
    )
