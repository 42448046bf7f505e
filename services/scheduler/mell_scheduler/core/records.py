"""What the core knows of each sequence, worker and model: plain state, kept in step by `Ledger` alone."""

from mell_shared.messages.scheduler import WorkerReport, WorkerSpec

_STATE_RUNNING = 0


class SequenceRecord:
    """The newest known generation of a sequence, at one worker; charged there with `size_blocks`."""

    __slots__ = (
        "blocks",
        "cap_tokens",
        "generation",
        "growth_tokens",
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
        """Tokens it is predicted to grow by in one epoch."""
        self.tokens = 0
        self.blocks = 0
        """As last reported; 0 while pending."""
        self.size_blocks = 0
        """Predicted for the end of the next epoch."""
        self.cap_tokens: int | None = None
        """Prompt and output limit, where the request said so."""
        self.pending_until_us: int | None = None
        """Placed, and not yet confirmed by a report; None: confirmed."""
        self.number = -1
        """The report that told of it last."""

    def observe(self, report_number: int, tokens: int, blocks: int, growth_limit: int) -> int:
        """Take one report's row; return the tokens gained per report since the last one, or -1 if unknown."""
        gain = -1
        if self.number >= 0:
            gain = max(0, tokens - self.tokens) // (report_number - self.number)
            # Decays slowly, so that a stall (a prefill beside it, a preemption) is not taken for an end.
            decayed = self.growth_tokens - (self.growth_tokens + 3) // 4
            self.growth_tokens = min(growth_limit, max(gain, decayed, 1))
        self.number, self.tokens, self.blocks = report_number, tokens, blocks
        self.pending_until_us = None
        self.size_blocks = max(blocks, self._predicted_blocks())
        return gain

    def _predicted_blocks(self) -> int:
        worker, predicted = self.worker, self.tokens + self.growth_tokens
        cap = self.cap_tokens
        if cap is None or cap > worker.max_total_tokens:
            cap = worker.max_total_tokens
        if predicted > cap:
            predicted = max(cap, self.tokens)
        return -(-predicted // worker.block_tokens)


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
        """Used blocks beyond its records' (stale copies); negative where records share blocks."""
        self.shared_blocks = 0
        """How often blocks are counted more than once in its rows."""
        self.sequences: dict[str, SequenceRecord] = {}
        self.stale: dict[str, tuple[int, int]] = {}
        """Superseded copies it still holds: sequence -> (generation, blocks)."""

    @property
    def worker_id(self) -> str:
        """The incarnation's id."""
        return self.spec.worker

    @property
    def load(self) -> int:
        """Sequences it holds or is about to."""
        return len(self.sequences) + len(self.stale)

    @property
    def usable(self) -> bool:
        """May get new sequences, once there is room."""
        return not self.silent and not self.draining

    def closed(self, tpot_target_us: int) -> bool:
        """No sequence more, by the second capacity: sequence count, and step time where it has a limit."""
        too_slow = 0 < tpot_target_us < self.step_us and self.load > 0
        return self.load >= self.spec.max_sequences or too_slow

    def note(self, report: WorkerReport, now_us: int) -> None:
        """Take the figures of a report that are not about single sequences."""
        self.heard_us = now_us
        self.number = report.number
        self.step_us = report.step_us
        self.running = report.states.count(_STATE_RUNNING)
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

    def __init__(self, name: str) -> None:
        self.name = name
        self.workers: dict[str, WorkerRecord] = {}
        self.pools: dict[int, str] = {}
        """Block size in tokens -> the policy's name for the workers with it."""
        self.closed: dict[str, None] = {}
        """Workers that take no sequence more (an ordered set)."""
        self.growth_tokens = 16
        """Recent mean growth of a running sequence in one epoch."""
        self.absent_since_us = 0
        """When its last worker went; meaningless while it has one."""
        self.limit_tokens = 0
        """The longest sequence any of its workers can ever hold; those that drain count only if all do."""
        self.least_total_tokens = 0
        """The longest sequence all of its workers can hold."""

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
