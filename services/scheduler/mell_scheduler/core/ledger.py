"""Who holds what: workers, their sequences, placements not yet confirmed; kept in step with the policy.

The policy has one item for each sequence, at the worker of its newest known generation, charged with its size
predicted for the end of the next epoch. Whatever else a report says is used (superseded copies; less what is
shared) goes to the policy as the worker's other blocks.
"""

from collections.abc import Collection
from typing import Literal

from mell_scheduler.core.records import ModelRecord, SequenceRecord, WorkerRecord
from mell_scheduler.core.values import CoreSettings
from mell_scheduler.policy.base import GpuId, GpuSpec, GpuState, Item, Policy, StepProfile
from mell_shared.messages.scheduler import PlaceRequest, SequenceFinished, WorkerReport, WorkerSpec

Standing = Literal["active", "draining", "standby", "silent"]


class Ledger:
    """Soft state, rebuilt from reports; the only caller of the policy."""

    def __init__(self, policy: Policy, settings: CoreSettings) -> None:
        self._policy = policy
        self._settings = settings
        self.workers: dict[str, WorkerRecord] = {}
        self.models: dict[str, ModelRecord] = {}
        self.sequences: dict[str, SequenceRecord] = {}
        self._pending: dict[str, SequenceRecord] = {}
        """Unconfirmed placements, the earliest deadline first."""

    # --- workers

    def join(self, spec: WorkerSpec, now_us: int) -> WorkerRecord:
        """Register a worker; it takes nothing before its first report."""
        model = self.models.setdefault(spec.model, ModelRecord(spec.model))
        pool = model.pools.setdefault(spec.block_tokens, f"{spec.model}/{spec.block_tokens}")
        worker = WorkerRecord(spec, pool, now_us)
        # Every item takes one unit of "time", so that the sequence count is the policy's second capacity.
        count = StepProfile(base_ns=0, per_item_ns=1, per_block_ns=0, limit_ns=spec.max_sequences)
        self._policy.add_gpu(GpuSpec(spec.worker, spec.kv_blocks, pool, spec.host, count))
        self._policy.pause_gpu(spec.worker)
        self.workers[spec.worker] = model.workers[spec.worker] = worker
        model.recount()
        return worker

    def remove(self, worker: WorkerRecord, now_us: int) -> None:
        """Forget a worker and all it held."""
        for record in list(worker.sequences.values()):
            self._forget(record)
        self._policy.remove_gpu(worker.worker_id)
        model = self.model_of(worker)
        del self.workers[worker.worker_id], model.workers[worker.worker_id]
        model.closed.pop(worker.worker_id, None)
        model.recount()
        if not model.workers:
            model.absent_since_us = now_us

    def expire_models(self, now_us: int) -> None:
        """Forget models that no worker has served for the grace time."""
        before_us = now_us - self._settings.worker_grace_us
        for model in [m for m in self.models.values() if not m.workers and m.absent_since_us <= before_us]:
            del self.models[model.name]

    def silence(self, worker: WorkerRecord) -> None:
        """No placements until it reports again."""
        worker.silent = True
        self._policy.pause_gpu(worker.worker_id)

    def model_of(self, worker: WorkerRecord) -> ModelRecord:
        """The model that a worker serves."""
        return self.models[worker.spec.model]

    def free_blocks(self, worker: WorkerRecord) -> int:
        """What the policy may still give away there; negative when growth is predicted to overload it."""
        return worker.spec.kv_blocks - self._policy.used_blocks(worker.worker_id)

    def standing(self, worker: WorkerRecord) -> Standing:
        """How operators see the worker; `standby` is ready and empty."""
        if worker.silent:
            return "silent"
        if worker.draining:
            return "draining"
        return "standby" if self._policy.state(worker.worker_id) is GpuState.STANDBY else "active"

    # --- reports

    def report(self, worker: WorkerRecord, report: WorkerReport, now_us: int) -> None:
        """Take a report that is newer than all before: the worker's state is what it says, plus what is pending."""
        assert report.number > worker.number, "older reports are dropped"
        worker.note(report, now_us)
        # A drained worker is released, and would take no rows; it is drained again below.
        self._set_draining(worker, draining=False)
        if worker.silent:
            worker.silent = False
            self._policy.resume_gpu(worker.worker_id)
        held_blocks, worker.stale = self._take_rows(worker, report)
        self._forget_missing(worker)
        self._share_out(worker, held_blocks)
        self._set_draining(worker, draining=report.draining)
        self._refresh_closed(worker)

    def _take_rows(self, worker: WorkerRecord, report: WorkerReport) -> tuple[int, dict[str, tuple[int, int]]]:
        """Update, adopt or set aside each row; returns the blocks of this worker's records, and the stale copies."""
        model, limit = self.model_of(worker), self._settings.growth_limit_tokens
        stale: dict[str, tuple[int, int]] = {}
        names: list[str] = []
        sizes: list[int] = []
        held_blocks = gained = gainers = 0
        for sequence, generation, tokens, blocks in zip(
            report.sequences, report.generations, report.tokens, report.blocks, strict=True
        ):
            record = self._holder(worker, sequence, generation, model.growth_tokens)
            if record is None:
                stale[sequence] = (generation, blocks)
                continue
            gain = record.observe(report.number, tokens, blocks, limit)
            names.append(sequence)
            sizes.append(record.size_blocks)
            held_blocks += blocks
            if gain > 0:
                gained, gainers = gained + gain, gainers + 1
        strangers = self._policy.update_gpu(worker.worker_id, names, sizes)
        assert not strangers, "the policy and the ledger disagree on what is where"
        if gainers:
            model.learn_growth(gained // gainers, limit)
        return held_blocks, stale

    def _holder(
        self, worker: WorkerRecord, sequence: str, generation: int, growth_tokens: int
    ) -> SequenceRecord | None:
        """The record a row is about; None if a newer generation is known elsewhere: the row is a stale copy."""
        record = self.sequences.get(sequence)
        if record is not None and record.worker is worker:
            if generation < record.generation or record.number == worker.number:
                return None
            record.generation = generation
            if record.pending_until_us is not None:
                del self._pending[sequence]
            return record
        if record is not None:
            if generation <= record.generation:
                return None
            self.supersede(record)
        return self._adopt(worker, sequence, generation, growth_tokens)

    def _adopt(self, worker: WorkerRecord, sequence: str, generation: int, growth_tokens: int) -> SequenceRecord:
        record = SequenceRecord(sequence, generation, worker, growth_tokens)
        self.sequences[sequence] = worker.sequences[sequence] = record
        self._policy.place(Item(sequence, 0, worker.pool), worker.worker_id)
        return record

    def _forget_missing(self, worker: WorkerRecord) -> None:
        """What the last report told of and this one does not has ended or gone; its end got lost."""
        gone = [r for r in worker.sequences.values() if r.number != worker.number and r.pending_until_us is None]
        for record in gone:
            self._forget(record)

    def _share_out(self, worker: WorkerRecord, held_blocks: int) -> None:
        """What is used beyond the records is `other`; what rows count twice is `shared`."""
        worker.other_blocks = worker.used_blocks - held_blocks
        all_rows = held_blocks + sum(blocks for _, blocks in worker.stale.values())
        worker.shared_blocks = max(0, all_rows - worker.used_blocks)
        self._policy.set_other_blocks(worker.worker_id, worker.other_blocks)

    def _set_draining(self, worker: WorkerRecord, *, draining: bool) -> None:
        if draining == worker.draining:
            return
        worker.draining = draining
        (self._policy.drain_gpu if draining else self._policy.undrain_gpu)(worker.worker_id)
        self.model_of(worker).recount()

    # --- sequences

    def place(self, request: PlaceRequest, barred: Collection[GpuId], deadline_us: int) -> WorkerRecord | None:
        """Put a sequence where the policy has room for it now; it is pending until `deadline_us`."""
        old = self.sequences.get(request.sequence)
        if old is not None:
            self.supersede(old)
        model = self.models[request.model]
        for block_tokens, pool in model.pools.items():
            tokens = self.predicted_tokens(request)
            item = Item(request.sequence, -(-tokens // block_tokens), pool)
            worker_id = self._policy.allocate(item, barred)
            if worker_id is not None:
                return self._expect(request, self.workers[worker_id], item.size_blocks, deadline_us)
        return None

    def _expect(self, request: PlaceRequest, worker: WorkerRecord, size_blocks: int, deadline_us: int) -> WorkerRecord:
        record = SequenceRecord(request.sequence, request.generation, worker, self.model_of(worker).growth_tokens)
        record.tokens, record.size_blocks = request.prompt_tokens, size_blocks
        record.pending_until_us = deadline_us
        if request.max_output_tokens is not None:
            record.cap_tokens = request.prompt_tokens + request.max_output_tokens
        self.sequences[request.sequence] = worker.sequences[request.sequence] = record
        self._pending[request.sequence] = record
        self._refresh_closed(worker)
        return worker

    def predicted_tokens(self, request: PlaceRequest) -> int:
        """A request's length at the end of the next epoch: prompt, first token, and the model's usual growth."""
        model = self.models[request.model]
        growth = model.growth_tokens
        if request.max_output_tokens is not None:
            growth = min(growth, request.max_output_tokens)
        return max(request.prompt_tokens, min(request.prompt_tokens + growth, model.limit_tokens))

    def supersede(self, record: SequenceRecord) -> None:
        """A newer generation is elsewhere; what this worker is known to hold of it stays used until it reports."""
        worker = record.worker
        confirmed = record.pending_until_us is None
        self._forget(record)
        if confirmed:
            worker.stale[record.sequence] = (record.generation, record.blocks)
            self._raise_other(worker, record.blocks)
            self._refresh_closed(worker)

    def finish(self, worker: WorkerRecord, event: SequenceFinished) -> None:
        """A sequence holds nothing there any more; unknown ones are ignored."""
        record = worker.sequences.get(event.sequence)
        if record is not None and event.generation >= record.generation:
            # Blocks that it may have shared are still used: only the next report knows.
            kept = min(record.blocks, worker.shared_blocks)
            self._forget(record)
            worker.shared_blocks -= kept
            self._raise_other(worker, kept)
        elif worker.stale.get(event.sequence, (event.generation + 1, 0))[0] <= event.generation:
            del worker.stale[event.sequence]
        self._refresh_closed(worker)

    def expire_pending(self, now_us: int) -> list[str]:
        """Forget placements that nothing confirmed in time; returns the models with more room now."""
        expired = []
        for record in self._pending.values():
            assert record.pending_until_us is not None
            if record.pending_until_us > now_us:
                break
            expired.append(record)
        for record in expired:
            self._forget(record)
        return [record.worker.spec.model for record in expired]

    def _forget(self, record: SequenceRecord) -> None:
        del self.sequences[record.sequence], record.worker.sequences[record.sequence]
        self._pending.pop(record.sequence, None)
        self._policy.depart(record.sequence)
        self._refresh_closed(record.worker)

    def _raise_other(self, worker: WorkerRecord, blocks: int) -> None:
        worker.other_blocks += blocks
        self._policy.set_other_blocks(worker.worker_id, worker.other_blocks)

    def _refresh_closed(self, worker: WorkerRecord) -> None:
        closed = self.model_of(worker).closed
        if worker.closed(self._settings.tpot_target_us):
            closed[worker.worker_id] = None
        else:
            closed.pop(worker.worker_id, None)

    # --- proof

    def check(self) -> None:
        """Re-derive every index and assert that it agrees with the policy. For tests; slow."""
        self._policy.check()
        assert list(self.workers) == self._policy.gpu_ids(), "workers and GPUs differ"
        for name, record in self.sequences.items():
            assert record.worker.sequences[name] is record
            assert self._policy.gpu_of(name) == record.worker.worker_id
        assert sum(len(w.sequences) for w in self.workers.values()) == len(self.sequences)
        pending = {name for name, record in self.sequences.items() if record.pending_until_us is not None}
        assert set(self._pending) == pending, "pending index out of step"
        deadlines = [r.pending_until_us or 0 for r in self._pending.values()]
        assert deadlines == sorted(deadlines), "pending placements out of order"
        for worker in self.workers.values():
            self._check_worker(worker)

    def _check_worker(self, worker: WorkerRecord) -> None:
        model = self.model_of(worker)
        assert model.workers[worker.worker_id] is worker
        assert (worker.worker_id in model.closed) == worker.closed(self._settings.tpot_target_us)
        charged = sum(record.size_blocks for record in worker.sequences.values()) + worker.other_blocks
        assert self._policy.used_blocks(worker.worker_id) == charged, "the policy charges something else"
        draining = self._policy.state(worker.worker_id) in (GpuState.DRAINING, GpuState.RELEASED)
        assert draining == worker.draining
