"""Who holds what: workers, their sequences, placements not yet confirmed; kept in step with the policy.

The policy has one item for each sequence, at the worker of its newest known generation, charged with its size
predicted for the end of the next epoch; while it moves, at both ends. Whatever else a report says is used
(superseded copies; less what is shared) goes to the policy as the worker's other blocks.
"""

from collections.abc import Collection
from typing import Any, Literal

from mell_scheduler.core.history import Chronicle, History, Page, What
from mell_scheduler.core.records import Horizon, Migration, ModelRecord, SequenceRecord, WorkerRecord
from mell_scheduler.core.shadow import Shadow
from mell_scheduler.core.values import CoreSettings, MigrationSettled, Outcome
from mell_scheduler.policy.base import GpuId, GpuSpec, GpuState, Item, Policy, StepProfile
from mell_shared.messages.scheduler import MigrationCommitted, PlaceRequest, SequenceFinished, WorkerSpec

Standing = Literal["active", "draining", "drained", "standby", "silent"]


class Ledger:
    """Soft state, rebuilt from reports. Besides it only `Intake` and `Migrations` call the policy."""

    def __init__(self, policy: Policy, settings: CoreSettings, shadow: Shadow | None = None) -> None:
        self._policy = policy
        self._shadow = shadow
        self._settings = settings
        self._growth_start = min(settings.growth_start_tokens, settings.growth_limit_tokens)
        self.workers: dict[str, WorkerRecord] = {}
        self.models: dict[str, ModelRecord] = {}
        self.sequences: dict[str, SequenceRecord] = {}
        self.pending: dict[str, SequenceRecord] = {}
        """Unconfirmed placements, the earliest deadline first."""
        self.moving: dict[str, SequenceRecord] = {}
        """Sequences with a move under way, in the order of beginning."""
        self.settled: list[MigrationSettled] = []
        """How moves came out since somebody looked last."""
        self.history = History(settings.remembered_sequences)
        self.now_us = 0
        """The time of the event that is being taken."""
        self.plan_us = 0
        """When moves are planned next."""
        self._move_us: int | None = None
        """What moves took lately; None: none was made."""

    # --- workers

    def join(self, spec: WorkerSpec, now_us: int) -> WorkerRecord:
        """Register a worker; it takes nothing before its first report."""
        model = self.models.get(spec.model)
        if model is None:
            model = self.models[spec.model] = ModelRecord(spec.model, self._growth_start)
        worker = WorkerRecord(spec, model.pool_of(spec), now_us)
        fixed = not spec.migration_modes
        step = _step_profile(self._settings, spec)
        self._policy.add_gpu(GpuSpec(spec.worker, spec.kv_blocks, worker.pool, spec.host, step, fixed))
        self._policy.pause_gpu(spec.worker)
        self.workers[spec.worker] = model.workers[spec.worker] = worker
        model.recount()
        return worker

    def remove(self, worker: WorkerRecord, now_us: int, *, left: bool = False) -> None:
        """Forget a worker and all it held.

        One that `left` in order had let go of everything: what was moving away is at its target, if anywhere.
        """
        for record in [r for r in worker.sequences.values() if left and r.migration is not None]:
            self.land(record, record.generation, now_us)
        for record in list(worker.sequences.values()):
            self.forget(record, "its worker is gone")
        for record in [r for r in self.moving.values() if r.migration and r.migration.target == worker.worker_id]:
            self._unmove(record, "ended", "the target is gone")  # the policy sees by itself that it failed
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

    def horizon(self, worker: WorkerRecord) -> Horizon:
        """How far ahead a worker's sizes reported now are predicted: see `Horizon`."""
        settings = self._settings
        interval_us = ahead_us = settings.report_interval_us
        if worker.modes:
            late_us = (self._move_us or 0) + settings.plan_late_us
            ahead_us = self._last_plan_us(interval_us) + settings.epoch_us + late_us
        return Horizon(ahead_us, interval_us, settings.growth_limit_tokens)

    def _last_plan_us(self, interval_us: int) -> int:
        """From now until the last plan that this report may be used for: the next one comes, late, only after that."""
        next_us = max(0, self.plan_us - self.now_us)
        left_us = interval_us + self._settings.report_late_us - next_us
        epoch_us = self._settings.epoch_us
        # At the very moment of a plan the report comes first.
        return next_us + (left_us - 1) // epoch_us * epoch_us if left_us > 0 else interval_us

    def free_blocks(self, worker: WorkerRecord) -> int:
        """What the policy may still give away there; negative when growth is predicted to overload it."""
        return worker.spec.kv_blocks - self._policy.used_blocks(worker.worker_id)

    def standing(self, worker: WorkerRecord) -> Standing:
        """How operators see the worker; `standby` is ready and empty."""
        if worker.silent:
            return "silent"
        if worker.draining:
            return "draining" if worker.load else "drained"
        return "standby" if self._policy.state(worker.worker_id) is GpuState.STANDBY else "active"

    def set_draining(self, worker: WorkerRecord, *, draining: bool) -> None:
        """It takes nothing new, and the policy empties it where its sequences can be moved; or the end of that."""
        if draining == worker.draining:
            return
        worker.draining = draining
        (self._policy.drain_gpu if draining else self._policy.undrain_gpu)(worker.worker_id)
        self.model_of(worker).recount()

    # --- moves

    def begin(self, record: SequenceRecord, migration: Migration) -> None:
        """The policy has begun a move, and it is carried out."""
        record.migration = migration
        self.moving[record.sequence] = record
        self._note(record, "moving", migration.transfer.move.reason.name.lower(), migration=migration.migration)

    def land(
        self, record: SequenceRecord, generation: int, now_us: int, told: MigrationCommitted | None = None
    ) -> None:
        """Its move is done: it is at the target, pending there until that reports it, and its source is free.

        `told` is the news of it, if that is how it is known.
        """
        migration = self._unmove(
            record, "committed", "" if told else "its source has let go of it, or its target reports it", told
        )
        source, target = record.worker, self.workers[migration.target]
        # Blocks that it may have shared are still used: only the next report knows.
        kept = min(record.blocks, source.shared_blocks)
        source.shared_blocks -= kept
        self._policy.moved(record.sequence)
        del source.sequences[record.sequence]
        target.sequences[record.sequence] = self.pending[record.sequence] = record
        record.worker, record.generation = target, generation
        record.number, record.blocks = -1, 0
        record.pending_until_us = now_us + self._settings.submit_timeout_us
        self.raise_other(source, kept)
        self.refresh_closed(source)
        self.refresh_closed(target)

    def take_up(self, record: SequenceRecord) -> bool:
        """Charge a preempted sequence with what it waits for, so that it can go where that is; whether it is one."""
        needed = record.worker.preempted.pop(record.sequence, None)
        if needed is None:
            return False
        self.raise_other(record.worker, -needed)
        record.size_blocks += needed
        self._policy.update(record.sequence, record.size_blocks)
        return True

    def lay_aside(self, record: SequenceRecord) -> None:
        """Undo `take_up`: it stays."""
        needed = record.size_blocks - record.blocks
        record.worker.preempted[record.sequence] = needed
        record.size_blocks = record.blocks
        self._policy.update(record.sequence, record.size_blocks)
        self.raise_other(record.worker, needed)

    def call_off(self, record: SequenceRecord, outcome: Outcome, reason: str) -> None:
        """Its move has failed: it stays at its source, and the target's memory is free."""
        self._unmove(record, outcome, reason)
        self._policy.failed(record.sequence)

    def _unmove(
        self, record: SequenceRecord, outcome: Outcome, reason: str, told: MigrationCommitted | None = None
    ) -> Migration:
        migration, record.migration = record.migration, None
        assert migration is not None, "it moves"
        del self.moving[record.sequence]
        settled = migration.settled(outcome, reason, self.now_us, told)
        if outcome == "committed":
            took_us = min(settled.took_us, self._settings.epoch_us)
            self._move_us = took_us if self._move_us is None else (7 * self._move_us + took_us) // 8
        self.settled.append(settled)
        what: What = "moved" if outcome == "committed" else "stayed"
        chronicle = self._note(record, what, reason, migration=migration.migration, settled=settled)
        if chronicle is not None and outcome == "committed":
            chronicle.moves += 1
        return migration

    def _note(self, record: SequenceRecord, what: What, why: str, **more: Any) -> Chronicle | None:
        page = Page(self.now_us, what, record.worker.worker_id, record.generation, why, **more)
        return self.history.write(record.sequence, page)

    # --- sequences

    def place(self, request: PlaceRequest, barred: Collection[GpuId], deadline_us: int) -> WorkerRecord | None:
        """Put a sequence where the policy has room for it now; it is pending until `deadline_us`."""
        old = self.sequences.get(request.sequence)
        if old is not None:
            self.supersede(old)
        model = self.models[request.model]
        for pool, block_tokens in model.pools.items():
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
        self.pending[request.sequence] = record
        self.refresh_closed(worker)
        self._note_placed(record, request)
        if self._shadow is not None:
            self._shadow.arrived(record, self._policy.spec(worker.worker_id))
        return worker

    def _note_placed(self, record: SequenceRecord, request: PlaceRequest) -> None:
        why = self._policy.name
        if request.excluded:
            why += f", not on {', '.join(request.excluded)}"
        free_blocks = self.free_blocks(record.worker) + record.size_blocks
        waited_us = int(min(request.waited_s, 1e6) * 1_000_000)
        size = {"blocks": record.size_blocks, "free_blocks": free_blocks, "waited_us": waited_us}
        chronicle = self._note(record, "placed", why, **size)
        if chronicle is not None:
            chronicle.request_id, chronicle.model = request.request_id, request.model

    def adopt(self, worker: WorkerRecord, sequence: str, generation: int) -> SequenceRecord:
        """A worker has what nobody here placed there."""
        record = SequenceRecord(sequence, generation, worker, self.model_of(worker).growth_tokens)
        self.sequences[sequence] = worker.sequences[sequence] = record
        self._policy.place(Item(sequence, 0, worker.pool), worker.worker_id)
        if self._shadow is not None:
            self._shadow.found(record, self._policy.spec(worker.worker_id))
        chronicle = self._note(record, "found", "its worker reports it")
        if chronicle is not None:
            chronicle.model = worker.spec.model
        return record

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
        self.forget(record, "a newer generation of it is asked for or elsewhere")
        if confirmed:
            worker.stale[record.sequence] = (record.generation, record.blocks)
            self.raise_other(worker, record.blocks)
            self.refresh_closed(worker)

    def finish(self, worker: WorkerRecord, event: SequenceFinished) -> None:
        """A sequence holds nothing there any more; unknown ones are ignored."""
        record = self.sequences.get(event.sequence)
        if record is not None and event.generation >= record.generation and _is_at(record, worker):
            holder = record.worker
            kept = min(record.blocks, holder.shared_blocks)
            self.forget(record, f"ended: {event.reason}")
            holder.shared_blocks -= kept
            self.raise_other(holder, kept)
        elif worker.stale.get(event.sequence, (event.generation + 1, 0))[0] <= event.generation:
            del worker.stale[event.sequence]
        self.refresh_closed(worker)

    def expire_pending(self, now_us: int) -> list[str]:
        """Forget placements that nothing confirmed in time; returns the models with more room now."""
        expired = []
        for record in self.pending.values():
            assert record.pending_until_us is not None
            if record.pending_until_us > now_us:
                break
            expired.append(record)
        for record in expired:
            self.forget(record, "no report confirmed it")
        return [record.worker.spec.model for record in expired]

    def forget(self, record: SequenceRecord, why: str) -> None:
        """It holds nothing anywhere any more; a move of it is over."""
        if record.migration is not None:
            self._unmove(record, "ended", "the sequence is gone from its source")
        page = Page(self.now_us, "gone", record.worker.worker_id, record.generation, why)
        self.history.close(record.sequence, page)
        del self.sequences[record.sequence], record.worker.sequences[record.sequence]
        self.pending.pop(record.sequence, None)
        self._policy.depart(record.sequence)
        if self._shadow is not None:
            self._shadow.gone(record.sequence)
        self.refresh_closed(record.worker)

    def raise_other(self, worker: WorkerRecord, blocks: int) -> None:
        """More of a worker's blocks are used by nothing that is known."""
        worker.other_blocks += blocks
        self._policy.set_other_blocks(worker.worker_id, worker.other_blocks)

    def refresh_closed(self, worker: WorkerRecord) -> None:
        """Bring the list of workers that take nothing in step with a change to one."""
        closed = self.model_of(worker).closed
        if worker.closed(self._settings.tpot_target_us):
            closed[worker.worker_id] = None
        else:
            closed.pop(worker.worker_id, None)


def _is_at(record: SequenceRecord, worker: WorkerRecord) -> bool:
    """Whether a worker may speak for a sequence: it has it, or it is the target of its move."""
    return record.worker is worker or (record.migration is not None and record.migration.target == worker.worker_id)


def _step_profile(settings: CoreSettings, spec: WorkerSpec) -> StepProfile:
    """The second capacity: step time where its parts are known, else the number of sequences, one unit each."""
    parts = (settings.step_base_ns, settings.step_per_sequence_ns, settings.step_per_block_ns)
    if settings.tpot_target_us and any(parts):
        return StepProfile(*parts, limit_ns=1_000 * settings.tpot_target_us)
    return StepProfile(base_ns=0, per_item_ns=1, per_block_ns=0, limit_ns=spec.max_sequences)
