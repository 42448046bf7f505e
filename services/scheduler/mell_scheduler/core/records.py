"""What the core knows of each sequence, worker and model: plain state, kept in step by `Ledger` alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mell_scheduler.core.values import MigrationSettled, Outcome
from mell_scheduler.policy.transfer import Mode, Transfer
from mell_shared.messages.scheduler import MigrationCommitted, WorkerReport, WorkerSpec

STATE_RUNNING = 0


class Horizon(NamedTuple):
    """How far ahead a report's sizes are predicted.

    What the next plan leaves as it is, only the plan after it can cure, and its moves take their time: sizes must
    fit until then, or workers preempt what could have been moved. Where nothing can be moved: one report.
    """

    ahead_us: int
    interval_us: int
    """Between two reports: growth is told per report."""
    limit_tokens: int
    """Most growth that is predicted."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A move under way: both ends hold its memory until it is settled."""

    migration: str
    sequence: str
    transfer: Transfer
    begun_us: int
    deadline_us: int

    @property
    def source(self) -> str:
        """Where the sequence is."""
        return self.transfer.move.source

    @property
    def target(self) -> str:
        """Where it goes."""
        return self.transfer.move.target

    def settled(self, outcome: Outcome, reason: str, now_us: int, told: MigrationCommitted | None) -> MigrationSettled:
        """Describe how it came out; `told` is the news of a commit, if it came."""
        transfer = self.transfer
        settled = MigrationSettled(
            self.migration,
            self.sequence,
            self.source,
            self.target,
            outcome,
            reason,
            mode=transfer.mode.value,
            cause=transfer.move.reason.name.lower(),
            blocks=transfer.move.size_blocks,
            predicted_us=transfer.predicted_us,
            took_us=now_us - self.begun_us,
        )
        return with_cost(settled, told) if told else settled


def with_cost(settled: MigrationSettled, told: MigrationCommitted) -> MigrationSettled:
    """Return an outcome with what the news of it tells of its cost."""
    return replace(
        settled,
        stopped_us=told.stopped_us,
        copied_bytes=told.copied_bytes,
        copy_us=told.copy_us,
        prefilled_tokens=told.prefilled_tokens,
        prefill_us=told.prefill_us,
    )


class SequenceRecord:
    """The newest known generation of a sequence, at one worker; charged there with `size_blocks`."""

    __slots__ = (
        "blocks",
        "cap_tokens",
        "generation",
        "growth_tokens",
        "migration",
        "number",
        "pending_until_us",
        "sequence",
        "size_blocks",
        "tokens",
        "worker",
    )

    def __init__(self, sequence: str, generation: int, worker: "WorkerRecord", growth_tokens: int) -> None:
        self.sequence = sequence
        self.generation = generation
        self.worker = worker
        self.growth_tokens = growth_tokens
        """Tokens it grows by between two reports."""
        self.tokens = 0
        self.blocks = 0
        """As last reported; 0 while pending."""
        self.size_blocks = 0
        """Predicted for the time at which moves of the plan after the next one are done."""
        self.cap_tokens: int | None = None
        """Prompt and output limit, where the request said so."""
        self.pending_until_us: int | None = None
        """Placed, and not yet confirmed by a report; None: confirmed."""
        self.migration: Migration | None = None
        """While it moves; it is at the source until then."""
        self.number = -1
        """The report that told of it last; -1: none of this worker's."""

    @property
    def waits(self) -> bool:
        """Preempted: its worker has it and it holds nothing there, so nothing of it could be copied."""
        return self.pending_until_us is None and not self.blocks

    @property
    def state(self) -> Literal["running", "placed", "moving"]:
        """How far it is; `placed` is not confirmed by a report."""
        if self.migration is not None:
            return "moving"
        return "running" if self.pending_until_us is None else "placed"


class WorkerRecord:
    """One worker incarnation as its join, its last report and the placements since then describe it."""

    __slots__ = (
        "block_tokens",
        "draining",
        "heard_us",
        "max_total_tokens",
        "number",
        "other_blocks",
        "pool",
        "preempted",
        "running",
        "sequences",
        "shared_blocks",
        "silent",
        "spec",
        "stale",
        "step_us",
        "used_blocks",
        "waiting",
    )

    def __init__(self, spec: WorkerSpec, pool: str, now_us: int) -> None:
        self.spec = spec
        self.block_tokens = spec.block_tokens
        self.max_total_tokens = spec.max_total_tokens
        self.pool = pool
        """Name of the interchangeable workers it belongs to in the policy: same model, same block size."""
        self.heard_us = now_us
        self.silent = True
        """No placements: it has not reported yet, or not for too long."""
        self.draining = False
        self.number = -1
        self.step_us = 0
        self.running = 0
        self.waiting = 0
        self.used_blocks = 0
        self.other_blocks = 0
        """Blocks no record answers for: stale copies, and what is withheld; less what records share."""
        self.shared_blocks = 0
        """How often blocks are counted more than once in its rows."""
        self.sequences: dict[str, SequenceRecord] = {}
        self.preempted: dict[str, int] = {}
        """Sequences that wait there for room and hold none, with the blocks each needs; charged as `other`."""
        self.stale: dict[str, tuple[int, int]] = {}
        """Superseded copies it still holds: sequence -> (generation, blocks)."""

    @property
    def worker_id(self) -> str:
        """The incarnation's id."""
        return self.spec.worker

    @property
    def modes(self) -> tuple[str, ...]:
        """How its sequences can be moved; none: not at all."""
        return self.spec.migration_modes

    def modes_to(self, target: "WorkerRecord") -> tuple[str, ...]:
        """How its sequences can be moved to another worker of its pool."""
        return tuple(mode for mode in self.modes if mode in target.modes)

    @property
    def load(self) -> int:
        """Sequences it holds or is about to."""
        return len(self.sequences) + len(self.stale)

    @property
    def usable(self) -> bool:
        """May get new sequences, once there is room."""
        return not self.silent and not self.draining

    def closed(self, tpot_target_us: int) -> bool:
        """No sequence more, by the second capacity: sequence count, and step time where it has a limit.

        Nor while a preempted one waits there: it refuses whatever comes before that is back.
        """
        too_slow = 0 < tpot_target_us < self.step_us and self.load > 0
        return self.load >= self.spec.max_sequences or too_slow or self.waiting > 0

    def note(self, report: WorkerReport, now_us: int) -> None:
        """Take the figures of a report that are not about single sequences."""
        self.heard_us = now_us
        self.number = report.number
        self.step_us = report.step_us
        self.running = report.states.count(STATE_RUNNING)
        self.waiting = len(report.states) - self.running
        self.used_blocks = max(0, self.spec.kv_blocks - report.free_blocks)


class ModelRecord:
    """A served model: its workers, and how fast its sequences grow."""

    __slots__ = (
        "absent_since_us",
        "closed",
        "growth_tokens",
        "least_total_tokens",
        "limit_tokens",
        "name",
        "pools",
        "workers",
    )

    def __init__(self, name: str, growth_tokens: int) -> None:
        self.name = name
        self.workers: dict[str, WorkerRecord] = {}
        self.pools: dict[str, int] = {}
        """The policy's name for workers that can stand for one another -> their block size in tokens."""
        self.closed: dict[str, None] = {}
        """Workers that take no sequence more (an ordered set)."""
        self.growth_tokens = growth_tokens
        """Recent mean growth of a running sequence in one epoch."""
        self.absent_since_us = 0
        """When its last worker went; meaningless while it has one."""
        self.limit_tokens = 0
        """The longest sequence any of its workers can ever hold; those that drain count only if all do."""
        self.least_total_tokens = 0
        """The longest sequence all of its workers can hold."""

    def pool_of(self, spec: WorkerSpec) -> str:
        """Name the pool of a worker. Sequences move only within one: same blocks, and where they can, same KV.

        Within one all have a mode in common: `tokens`, or all of theirs.
        """
        parts = [spec.model, str(spec.block_tokens)]
        if spec.migration_modes:
            modes = sorted(spec.migration_modes)
            parts += [spec.kv_layout, "tokens" if Mode.TOKENS.value in modes else "+".join(modes)]
        pool = "/".join(parts)
        self.pools[pool] = spec.block_tokens
        return pool

    def recount(self) -> None:
        """Derive the limits anew after a worker came, went, or changed its mind about draining."""
        every = [worker.max_total_tokens for worker in self.workers.values()]
        staying = [worker.max_total_tokens for worker in self.workers.values() if not worker.draining]
        self.limit_tokens = max(staying or every, default=0)
        self.least_total_tokens = min(every, default=0)

    def learn_growth(self, gain_tokens: int, limit: int) -> None:
        """Move the mean towards what one report's running sequences gained on average."""
        mean = (7 * self.growth_tokens + gain_tokens + 7) // 8
        self.growth_tokens = min(limit, max(1, mean))


Row = tuple[SequenceRecord, int, int, int]
"""A report's row: its record, the report that told of it before (-1: none of this worker's), tokens, blocks."""


class Seen(NamedTuple):
    """What the rows of one report come to."""

    sequences: list[str]
    sizes: list[int]
    """Blocks that each is charged with from now on, in the same order."""
    held_blocks: int
    gained_tokens: int
    """Per report, by all that told of growth."""
    gainers: int


def observe(rows: Iterable[Row], number: int, horizon: Horizon) -> Seen:
    """Take the rows of a worker's report into its records, and predict their sizes.

    A hundred thousand rows a second come through here: written out, and without the built-in min and max, it takes
    half the time.
    """
    ahead_us, interval_us, limit_tokens = horizon
    sequences: list[str] = []
    sizes: list[int] = []
    held_blocks = gained_tokens = gainers = 0
    for record, since, tokens, blocks in rows:
        growth, worker = record.growth_tokens, record.worker
        if since >= 0:
            # Decays slowly, so that a stall (a prefill beside it, a preemption) is not taken for an end.
            growth -= (growth + 3) // 4
            gain = (tokens - record.tokens) // (number - since)
            if gain > 0:
                gained_tokens += gain
                gainers += 1
                if gain > growth:  # noqa: PLR1730
                    growth = gain
            if growth > limit_tokens:
                growth = limit_tokens
            elif growth < 1:
                growth = 1
            record.growth_tokens = growth
        record.tokens, record.blocks, record.pending_until_us = tokens, blocks, None
        growth = -(-growth * ahead_us // interval_us)
        predicted = tokens + (growth if growth < limit_tokens else limit_tokens)  # noqa: FURB136
        cap = record.cap_tokens
        if cap is None or cap > worker.max_total_tokens:
            cap = worker.max_total_tokens
        if predicted > cap:
            predicted = max(cap, tokens)
        size = -(-predicted // worker.block_tokens)
        if size < blocks:  # noqa: PLR1730
            size = blocks
        record.size_blocks = size
        sequences.append(record.sequence)
        sizes.append(size)
        held_blocks += blocks
    return Seen(sequences, sizes, held_blocks, gained_tokens, gainers)
