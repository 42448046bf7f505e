"""Continuous batching: who runs, what each engine step computes, and who gives way when blocks run out.

Decodes come first, then prefill in chunks, all within a budget of tokens a step. Whoever runs holds blocks for all
its tokens and the next one. Only when a decode finds no block is somebody preempted: the lowest priority, then the
latest arrival; it gives all its blocks back, waits, and comes back before anything new, recomputing what the prefix
cache has lost. The first in order is never preempted, so it always ends.

Sequences that are about to move here hold blocks too, and are prefilled with what is left of the budget. Short of
blocks, they go first: their source still has them. Blocks that a transfer still uses come free a moment later; whoever
needs one then sits a step out.
"""

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Values
from operator import attrgetter
from typing import NamedTuple

from mell_gpu_worker.core.blocks import BlockPool
from mell_gpu_worker.core.loans import Loans
from mell_gpu_worker.core.sequence import Phase, Sequence
from mell_gpu_worker.core.step import SampledToken, StepResult, StepRow
from mell_shared.messages.sampling import FinishReason

_ORDER = attrgetter("order")
_UNBOUNDED = 1 << 62


class Progress(NamedTuple):
    """What a step did for one sequence: a new last token or none, and why it ends now, if it does."""

    sequence: Sequence
    sampled: bool
    end: FinishReason | None


class Batcher:
    """The running and the preempted sequences over one pool. `root`: parent digest of first blocks."""

    def __init__(
        self,
        pool: BlockPool,
        root: bytes,
        *,
        max_step_tokens: int,
        max_sequences: int,
        chunked_prefill: bool = True,
    ) -> None:
        assert max_step_tokens >= max_sequences, "every running sequence must be able to decode in one step"
        self.pool = pool
        self.loans = Loans(pool)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.arriving: list[Sequence] = []
        """Held for migrations, in the order of their reservation."""
        self.newcomers: list[Sequence] = []
        """Moved here and running, without a token made here so far."""
        self.preemptions = 0
        self.withheld_blocks = 0
        """Of those that seem free, how many nothing new may have: somebody else holds them."""
        self.prefix_queried_tokens = 0
        """Of new sequences, looked for in the prefix cache."""
        self.prefix_hit_tokens = 0
        """Of these, found there."""
        self.decodes_only = True
        """Whether the step planned last has no prefill in it."""
        self._root = root
        self.max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._chunked_prefill = chunked_prefill
        self._step: list[tuple[Sequence, int]] = []
        self._ended_in_step: list[list[int]] = []
        self._sitting_out = 0
        """Sequences of the step being planned that wait for blocks which come free soon."""

    @property
    def computing(self) -> bool:
        """Whether a planned step has not been committed yet."""
        return bool(self._step)

    # --- who runs

    def admit(self, sequence: Sequence) -> bool:
        """Run `sequence` if its tokens and one more fit now and nobody preempted waits; else change nothing."""
        tokens = len(sequence.token_ids) + 1
        if self._full or self.waiting or not self._place(sequence, tokens, spare_blocks=self.withheld_blocks):
            return False
        self._count_prefix(sequence)
        insort(self.running, sequence, key=_ORDER)
        return True

    @property
    def _full(self) -> bool:
        return len(self.running) + len(self.arriving) >= self._max_sequences

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Hold blocks for `tokens` tokens of a sequence that may move here, if they fit now; else change nothing."""
        # A block of growth for each that runs, else the reservation would soon be dropped again.
        spare_blocks = len(self.running) + self.withheld_blocks
        if self._full or self.waiting or not self._place(sequence, tokens, spare_blocks):
            return False
        sequence.phase = Phase.ARRIVING
        self.arriving.append(sequence)
        return True

    def start(self, sequence: Sequence, computed: int) -> None:
        """Run an arriving sequence, KV of whose first `computed` tokens is in place; its blocks hold all its tokens."""
        assert not sequence.in_step, "its blocks are being written"
        assert sequence.computed <= computed < len(sequence.token_ids)
        assert len(sequence.token_ids) <= len(sequence.blocks) * self.pool.block_tokens
        self.arriving.remove(sequence)
        self._seal(sequence, computed - sequence.computed)
        sequence.computed = computed
        needed = self.pool.blocks_for(len(sequence.token_ids) + 1)
        self.pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]
        sequence.phase, sequence.started = Phase.RUNNING, True
        insort(self.running, sequence, key=_ORDER)
        self.newcomers.append(sequence)

    def wait(self, sequence: Sequence) -> None:
        """Let a new sequence run as soon as it and its blocks fit, like one that was preempted."""
        sequence.phase = Phase.WAITING
        insort(self.waiting, sequence, key=_ORDER)

    def end(self, sequence: Sequence) -> None:
        """Take a live sequence out; its blocks are free now, or when the step being computed is done."""
        self._rows_of(sequence.phase).remove(sequence)
        self._no_newcomer(sequence)
        if sequence.in_step:
            self._ended_in_step.append(sequence.blocks)
        else:
            self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.phase = Phase.ENDED

    def _rows_of(self, phase: Phase) -> list[Sequence]:
        return {Phase.RUNNING: self.running, Phase.WAITING: self.waiting, Phase.ARRIVING: self.arriving}[phase]

    def _no_newcomer(self, sequence: Sequence) -> None:
        if sequence in self.newcomers:
            self.newcomers.remove(sequence)

    def _place(self, sequence: Sequence, tokens: int, spare_blocks: int) -> bool:
        shared = self._cached_blocks(sequence)
        fresh = self.pool.blocks_for(tokens) - len(shared)
        if not self.pool.fits(shared, fresh + spare_blocks):
            return False
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(fresh)
        self._skip_cached(sequence, len(shared))
        return True

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        # Strictly before the last token: at least one is computed, and never into a shared block.
        return self.pool.cached(self._digests(sequence, len(sequence.token_ids) - 1))

    def _skip_cached(self, sequence: Sequence, shared_blocks: int) -> None:
        sequence.computed = shared_blocks * self.pool.block_tokens
        if not sequence.started:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_tokens)

    def _count_prefix(self, sequence: Sequence) -> None:
        """Count what the cache was asked for, once for each sequence."""
        if self.pool.prefix_cache and not sequence.started:
            self.prefix_queried_tokens += len(sequence.token_ids)
            self.prefix_hit_tokens += sequence.computed

    def _resume_waiting(self) -> None:
        # One that stands still is about to go on elsewhere.
        for sequence in [row for row in self.waiting if not row.halted]:
            # A block of growth for each that runs, else it would soon be preempted again.
            if self._full or not self._place(sequence, len(sequence.token_ids) + 1, spare_blocks=len(self.running)):
                return
            self._count_prefix(sequence)
            self.waiting.remove(sequence)
            sequence.phase = Phase.RUNNING
            insort(self.running, sequence, key=_ORDER)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._no_newcomer(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.phase = Phase.WAITING
        insort(self.waiting, sequence, key=_ORDER)
        self.preemptions += 1

    # --- a step

    def plan(self) -> list[StepRow]:
        """Return the next step's rows, none if nobody runs; the step before must be committed."""
        assert not self._step, "the last step is not committed"
        self._resume_waiting()
        self._sitting_out = 0
        rows = list(self._decode_rows())
        budget_tokens = self.max_step_tokens - len(rows)
        prefills = list(self._prefill_rows(budget_tokens if self._chunked_prefill else _UNBOUNDED))
        if self._chunked_prefill:
            budget_tokens -= sum(row.count for row in prefills)
        prefills += self._arriving_rows(budget_tokens)
        self.decodes_only = not prefills
        return rows + prefills

    def _decode_rows(self) -> Iterator[StepRow]:
        size, running = self.pool.block_tokens, Phase.RUNNING
        for sequence in tuple(self.running):
            tokens = len(sequence.token_ids)
            if sequence.computed != tokens - 1 or not sequence.started or sequence.phase is not running:
                continue
            if sequence.halted:
                continue
            if tokens <= len(sequence.blocks) * size or self._grow(sequence):
                yield self._row(sequence, 1)

    def _grow(self, sequence: Sequence) -> bool:
        """Give `sequence` one more block, at the cost of those behind it; False if it gets none in this step."""
        while not self.pool.free_blocks:
            if self.loans and self.loans.coming_blocks > self._sitting_out:
                self._sitting_out += 1
                return False
            if self.arriving:
                self.end(self.arriving[-1])
                continue
            # Not one that stands still: its blocks are about to be free, or it is about to go on.
            victim = next(row for row in reversed(self.running) if not row.halted)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _prefill_rows(self, budget_tokens: int) -> Iterator[StepRow]:
        coming: set[bytes] = set()
        size = self.pool.block_tokens
        # First who has moved here in mid-decode: somebody is waiting for the next token.
        for sequence in (*self.newcomers, *self.running):
            if not budget_tokens:
                return
            if sequence.halted or sequence.in_step or (not sequence.started and self._soon_cached(sequence, coming)):
                continue
            if len(sequence.token_ids) > len(sequence.blocks) * size:
                continue  # sits this step out
            count = min(len(sequence.token_ids) - sequence.computed, budget_tokens)
            budget_tokens -= count
            coming.update(self._digests_filled(sequence, count))
            yield self._row(sequence, count)

    def _arriving_rows(self, budget_tokens: int) -> Iterator[StepRow]:
        for sequence in self.arriving:
            count = min(sequence.prefill_limit - sequence.computed, budget_tokens)
            if count > 0:
                budget_tokens -= count
                yield self._row(sequence, count)

    def _soon_cached(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """Whether another row of this step computes the block that `sequence` needs next, so that waiting saves work.

        First, what others have computed since `sequence` arrived takes the place of its own blank blocks.
        """
        shared = self._cached_blocks(sequence)
        known = sequence.computed // self.pool.block_tokens
        if len(shared) > known:
            self.pool.share(shared[known:])
            self.pool.release(sequence.blocks[known : len(shared)])
            sequence.blocks[known : len(shared)] = shared[known:]
            self._skip_cached(sequence, len(shared))
        needed = self._digests(sequence, len(sequence.token_ids) - 1)[sequence.computed // self.pool.block_tokens :]
        return bool(needed) and needed[0] in coming

    def _row(self, sequence: Sequence, count: int) -> StepRow:
        sequence.in_step = sequence.started = True
        self._step.append((sequence, count))
        token_ids, start = sequence.token_ids, sequence.computed
        sampling = sequence.sampling if start + count == len(token_ids) else None
        # By position, in the order of the fields: this is made for every token.
        return StepRow(
            sequence.sequence,
            token_ids,
            sequence.prompt_tokens,
            start,
            count,
            sequence.blocks,
            sampling,
            sequence.kv_source,
        )

    def commit(self, result: StepResult) -> list[Progress]:
        """Take in the planned step's outcome; sequences that end with it hold nothing afterwards."""
        step, self._step = self._step, []
        sampled, failed, pending, ended = result.sampled, result.failed, result.pending, result.ended
        assert len(step) == len(sampled), "the engine answered for other rows than it got"
        for sequence, _ in step:
            sequence.in_step = False
        for table in self._ended_in_step:
            self.pool.release(table)
        self._ended_in_step.clear()
        for row, fetched in result.fetched.items():
            sequence = step[row][0]
            sequence.fetched = sequence.fetched.plus(fetched)
        return [
            self._advance(sequence, count, sampled[row], "error" if row in failed else ended.get(row))
            for row, (sequence, count) in enumerate(step)
            if sequence.phase is not Phase.ENDED and row not in pending
        ]

    def _advance(
        self, sequence: Sequence, count: int, sampled: SampledToken | None, verdict: FinishReason | None
    ) -> Progress:
        """Take in a row's outcome; `verdict` is why the engine ends its sequence, if it does."""
        size = self.pool.block_tokens
        if sequence.computed % size + count >= size:
            self._seal(sequence, count)
        sequence.computed += count
        end = verdict
        if verdict == "error":
            sampled = None
        elif sampled is not None:
            end = sequence.append(sampled) or verdict
            if self.newcomers:
                self._no_newcomer(sequence)
        if end is not None:
            self.end(sequence)
        return Progress(sequence, sampled is not None, end)

    def _seal(self, sequence: Sequence, count: int) -> None:
        first = sequence.computed // self.pool.block_tokens
        for offset, digest in enumerate(self._digests_filled(sequence, count)):
            self.pool.seal(sequence.blocks[first + offset], digest)

    def _digests_filled(self, sequence: Sequence, count: int) -> Values[bytes]:
        """Digests of the blocks that computing `count` more tokens fills."""
        first = sequence.computed // self.pool.block_tokens
        return self._digests(sequence, sequence.computed + count)[first:]

    def _digests(self, sequence: Sequence, tokens: int) -> Values[bytes]:
        """Digests of the blocks that the first `tokens` tokens fill; none without a prefix cache."""
        if not self.pool.prefix_cache:
            return ()
        return sequence.digests(self._root, tokens // self.pool.block_tokens, self.pool.block_tokens)

    def check(self) -> None:
        """Assert that every block has the holders it should have and every sequence is where its phase says."""
        held = [sequence.blocks for sequence in (*self.running, *self.arriving)]
        self.pool.check([*held, *self._ended_in_step, *self.loans])
        assert self.running == sorted(self.running, key=_ORDER), "running sequences are out of order"
        assert self.waiting == sorted(self.waiting, key=_ORDER), "waiting sequences are out of order"
        assert all(sequence.phase is Phase.RUNNING for sequence in self.running), "a running sequence says otherwise"
        assert all(sequence.phase is Phase.WAITING for sequence in self.waiting), "a waiting sequence says otherwise"
        for sequence in self.running:
            tokens = len(sequence.token_ids)
            assert sequence.computed < tokens, f"{sequence.sequence} has nothing left to compute"
            assert tokens <= len(sequence.blocks) * self.pool.block_tokens + 1, f"{sequence.sequence} lacks blocks"
        assert all(sequence in self.running for sequence in self.newcomers), "a newcomer does not run"
        assert all(sequence.phase is Phase.ARRIVING for sequence in self.arriving), "an arriving one says otherwise"
        for sequence in self.arriving:
            tokens = min(len(sequence.token_ids) - 1, len(sequence.blocks) * self.pool.block_tokens)
            assert sequence.prefill_limit <= tokens, f"{sequence.sequence} prefills beyond its tokens or blocks"
        assert not any(sequence.blocks or sequence.computed for sequence in self.waiting), "who waits holds something"
