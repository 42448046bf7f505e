"""Moves of an epoch: planned by the policy, divided between links and prefill, ordered, followed to their end."""

from collections.abc import Iterable
from dataclasses import replace
from math import lcm

from mell_scheduler.core.boundaries import Boundaries
from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.records import Migration, SequenceRecord, with_cost
from mell_scheduler.core.values import Command, CoreSettings, MigrationSettled, StartMigration
from mell_scheduler.policy.base import Move, Policy
from mell_scheduler.policy.transfer import Candidate, Mode, Transfer, directed, divide
from mell_shared.messages.scheduler import LaneMeasured, MigrationCommitted, MigrationFailed
from mell_shared.messages.worker import Migrate, MigrationReason

_ABOUT_THE_PAIR = ("unsupported", "unreachable", "link", "corrupt", "timeout")
"""Failures that the next sequence between the same two workers is likely to meet too."""
_LONGEST_BACKOFF = 6
"""Doublings of a pair's rest: at most 64 epochs."""
_MOST_UNPRICED = 1_000
_REASONS: dict[str, MigrationReason] = {
    "OVERLOAD": "overload",
    "DRAIN": "drain",
    "ATTACHED": "attached",
    "CONSOLIDATE": "consolidate",
    "MANUAL": "manual",
}


class Migrations:
    """Plans an epoch's moves and settles each once: by an event, a report, or its timeout."""

    def __init__(self, ledger: Ledger, policy: Policy, settings: CoreSettings) -> None:
        self._ledger = ledger
        self._policy = policy
        self._settings = settings
        self._boundaries = Boundaries(ledger, settings)
        self._resting: dict[tuple[str, str], tuple[int, int]] = {}
        """(source, target) -> failures in a row, and until when nothing is moved between them."""
        self._unpriced: dict[str, MigrationSettled] = {}
        """Moves that reports have settled and whose own news may still come, the latest last."""
        self._begun = 0
        self.term = 0
        self.paused = False
        """Nothing is planned; what an operator orders is moved all the same."""

    # --- an epoch

    def plan(self, now_us: int) -> list[Command]:
        """This epoch's moves, the most urgent first; what finds no room in the boundaries waits for another."""
        self._forget_rested(now_us)
        if self.paused or not any(worker.modes for worker in self._ledger.workers.values()):
            return []
        candidates: list[Candidate] = []
        for move in [*self._rescues(), *self._policy.epoch(now_us)]:
            record = self._ledger.sequences[move.item_id]
            # What no report has confirmed may not be there at all.
            if record.pending_until_us is not None or self._rests(move, now_us):
                self._defer(record)
            else:
                candidates.append(self._candidate(move, record))
        if not candidates:
            return []
        block_tokens = lcm(*(self._ledger.workers[c.move.source].block_tokens for c in candidates))
        division = divide(candidates, self._boundaries.budgets(candidates, block_tokens))
        for move in division.deferred:
            self._defer(self._ledger.sequences[move.item_id])
        return [self._begin(transfer, now_us, self._next_name()) for transfer in division.transfers]

    def _next_name(self) -> str:
        self._begun += 1
        return f"{self.term}-{self._begun}"

    def _rescues(self) -> list[Move]:
        """What a worker had to stop for want of room goes to where there is some, before whoever runs must move."""
        waiting = [
            worker.sequences[sequence]
            for worker in self._ledger.workers.values()
            if worker.preempted and Mode.TOKENS.value in worker.modes
            for sequence in worker.preempted
            if sequence in worker.sequences
        ]
        moves = []
        for record in waiting:
            self._ledger.take_up(record)
            move = self._policy.relocate(record.sequence)
            if move is None:
                self._ledger.lay_aside(record)
            else:
                moves.append(move)
        return moves

    def _defer(self, record: SequenceRecord) -> None:
        self._policy.deferred(record.sequence)
        if record.waits:
            self._ledger.lay_aside(record)

    def _candidate(self, move: Move, record: SequenceRecord) -> Candidate:
        modes = record.worker.modes_to(self._ledger.workers[move.target])
        if record.waits:
            modes = (Mode.TOKENS.value,)
        return Candidate(
            move,
            tokens=max(1, record.tokens),
            bytes_per_token=record.worker.spec.kv_bytes_per_token or self._settings.kv_bytes_per_token,
            links=self._boundaries.links(move.source, move.target),
            modes=frozenset(mode for mode in Mode if mode.value in modes),
        )

    def order(
        self, record: SequenceRecord, target: str, mode: Mode | None, now_us: int, *, name: str
    ) -> StartMigration | None:
        """An operator's move, begun now whatever the boundaries say, and counted in them; None without room there.

        A source that knows a move of this `name`, ordered by an earlier leader, goes on with that one.
        """
        taken_up = self._ledger.take_up(record)
        move = self._policy.order_move(record.sequence, target)
        if move is None:
            if taken_up:
                self._ledger.lay_aside(record)
            return None
        candidate = self._candidate(move, record)
        budgets = self._boundaries.budgets([candidate], record.worker.block_tokens, beside_moving=False)
        return self._begin(directed(candidate, budgets, mode), now_us, name)

    def _begin(self, transfer: Transfer, now_us: int, name: str) -> StartMigration:
        move = transfer.move
        record = self._ledger.sequences[move.item_id]
        deadline_us = now_us + self._settings.migration_timeout_us
        self._ledger.begin(record, Migration(name, record.sequence, transfer, now_us, deadline_us))
        order = Migrate(
            migration=name,
            sequence=record.sequence,
            generation=record.generation,
            target=move.target,
            mode=transfer.mode.value,
            split_tokens=transfer.recomputed_tokens if transfer.mode is Mode.HYBRID else 0,
            planned_tokens=move.size_blocks * record.worker.block_tokens,
            reason=_REASONS[move.reason.name],
            term=self.term,
        )
        return StartMigration(move.source, order, move.size_blocks, transfer.predicted_us)

    # --- what becomes of a move

    def committed(self, event: MigrationCommitted, now_us: int) -> str | None:
        """The sequence goes on at its target; returns the model with more room, None if this is no news.

        A move that is not under way (it was given up here, or an earlier leader's) is left to the reports.
        """
        record = self._ledger.moving.get(event.sequence)
        migration = None if record is None else record.migration
        if record is None or migration is None or migration.migration != event.migration:
            return None
        if migration.target != event.worker or event.generation <= record.generation:
            return None
        self._resting.pop((migration.source, migration.target), None)
        self._boundaries.observe(event)
        self._ledger.land(record, event.generation, now_us, event)
        return record.worker.spec.model

    def await_price(self, settled: Iterable[MigrationSettled]) -> None:
        """Remember those whose cost nobody has told yet."""
        for outcome in settled:
            if outcome.unpriced:
                self._unpriced[outcome.migration] = outcome
        while len(self._unpriced) > _MOST_UNPRICED:
            del self._unpriced[next(iter(self._unpriced))]

    def priced(self, event: MigrationCommitted) -> MigrationSettled | None:
        """The outcome of a move that a report has settled, with what it cost; None if that was not missing."""
        outcome = self._unpriced.get(event.migration)
        if outcome is None or (outcome.sequence, outcome.target) != (event.sequence, event.worker):
            return None
        del self._unpriced[event.migration]
        if event.worker in self._ledger.workers:
            self._boundaries.observe(event)
        settled = with_cost(replace(outcome, reason=""), event)
        self._ledger.history.amend(settled)
        return settled

    def failed(self, event: MigrationFailed, now_us: int) -> str | None:
        """The sequence stays; returns the model with more room, None if this is no news."""
        record = self._ledger.moving.get(event.sequence)
        if record is None or record.migration is None or record.migration.migration != event.migration:
            return None
        if event.reason in _ABOUT_THE_PAIR:
            self._rest(record.migration, now_us)
        self._ledger.call_off(record, "failed", f"{event.reason}: {event.message}" if event.message else event.reason)
        return record.worker.spec.model

    def expire(self, now_us: int) -> list[str]:
        """Give up moves that nothing has settled in time; returns the models with more room now."""
        late: list[SequenceRecord] = []
        for record in self._ledger.moving.values():
            assert record.migration is not None
            if record.migration.deadline_us > now_us:
                break
            late.append(record)
        for record in late:
            assert record.migration is not None
            self._rest(record.migration, now_us)
            self._ledger.call_off(record, "timeout", "nothing was heard of it")
        return [record.worker.spec.model for record in late]

    def measured(self, event: LaneMeasured) -> None:
        """Two workers have measured the lane between them."""
        self._boundaries.measured(event)

    # --- pairs of workers that could not

    def _rest(self, migration: Migration, now_us: int) -> None:
        pair = (migration.source, migration.target)
        failures, _ = self._resting.get(pair, (0, 0))
        until_us = now_us + (self._settings.epoch_us << min(failures, _LONGEST_BACKOFF))
        self._resting[pair] = (failures + 1, until_us)

    def _rests(self, move: Move, now_us: int) -> bool:
        return self._resting.get((move.source, move.target), (0, now_us))[1] > now_us

    def _forget_rested(self, now_us: int) -> None:
        """A pair's failures count until it could have been tried for long."""
        longest_us = self._settings.epoch_us << _LONGEST_BACKOFF
        for pair in [p for p, (_, until_us) in self._resting.items() if until_us + longest_us <= now_us]:
            del self._resting[pair]
