"""One simulated worker in timed mode: chunked prefill beside decodes, memory in blocks, a prefix cache."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import chain

from mell_scheduler.policy.base import GpuId, ItemId, Move
from mell_scheduler.sim.requests import Request
from mell_scheduler.sim.roofline import BLOCK_TOKENS, CHUNK_TOKENS, Roofline

_HASH_TOKENS = 512
"""Tokens under one of a trace's prefix hashes."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's life. Times are seconds of simulated time."""

    item_id: ItemId
    request: Request
    arrival_s: float
    generated: float = 0.0
    prefill_left: float = 0.0
    ready_s: float = 0.0
    """When it may start to prefill."""
    first_token_s: float | None = None
    finished_s: float | None = None
    slow_tokens: float = 0.0
    """Tokens whose gap to the one before was over the objective."""
    preempted_s: float | None = None
    """Since when it has waited to go on, if it does."""
    resumes: list[tuple[float, int]] = field(default_factory=list)
    """For each preemption the seconds until it went on, and the tokens to prefill anew."""
    gpu: "Engine | None" = None
    move: Move | None = None

    @property
    def context(self) -> int:
        """Tokens whose KV it holds."""
        return self.request.prompt_tokens + int(self.generated)

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        assert self.finished_s is not None
        assert self.first_token_s is not None
        return (self.finished_s - self.first_token_s) / max(1, self.request.output_tokens - 1)


@dataclass(slots=True, eq=False)
class Engine:
    """A worker. `prefills` holds sequences in order of arrival; `foreign_tokens` are prefills for moves to come."""

    gpu_id: GpuId
    roofline: Roofline
    ready_s: float
    decoding: dict[ItemId, Sequence] = field(default_factory=dict)
    prefills: deque[Sequence] = field(default_factory=deque)
    incoming: dict[ItemId, Sequence] = field(default_factory=dict)
    foreign_tokens: float = 0.0
    prefill_clock_s: float = 0.0
    idle_since_s: float = 0.0
    stopping: bool = False
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def sequences(self) -> list[Sequence]:
        """All that hold memory here, in order of coming."""
        return [*self.decoding.values(), *self.prefills]

    @property
    def empty(self) -> bool:
        """Nothing here or coming."""
        return not self.decoding and not self.prefills and not self.incoming

    @property
    def used_blocks(self) -> int:
        """Residents and reservations."""
        held = chain(self.decoding.values(), self.prefills, self.incoming.values())
        return sum((s.request.prompt_tokens + int(s.generated)) // BLOCK_TOKENS + 1 for s in held)

    def admit(self, sequence: Sequence, now_s: float, prefix_cache: bool) -> None:
        """Start to prefill: the prompt and what was generated before a preemption, less what is cached."""
        sequence.gpu = self
        cached = self._cached_tokens(sequence.request) if prefix_cache else 0
        sequence.prefill_left = max(1.0, float(sequence.context - cached))
        sequence.ready_s = now_s
        self.prefills.append(sequence)

    def _cached_tokens(self, request: Request) -> int:
        hits = 0
        for hash_id in request.hash_ids:
            if hash_id not in self.cached:
                break
            hits += 1
        for hash_id in request.hash_ids:
            self.cached[hash_id] = None
            self.cached.move_to_end(hash_id)
        while len(self.cached) * _HASH_TOKENS > self.roofline.capacity_tokens:
            self.cached.popitem(last=False)
        return min(hits * _HASH_TOKENS, request.prompt_tokens - 1)

    def remove(self, sequence: Sequence) -> None:
        """The sequence's memory is free."""
        if self.decoding.pop(sequence.item_id, None) is None:
            self.prefills.remove(sequence)
        sequence.gpu = None

    def advance(self, now_s: float, length_s: float, slow_s: float) -> list[Sequence]:
        """Run for `length_s`; returns what finished. Gaps over `slow_s` count as slow tokens."""
        batch, kv_tokens = len(self.decoding), sum(s.context for s in self.decoding.values())
        chunk_s = self.roofline.step_s(batch, kv_tokens, CHUNK_TOKENS)
        busy_s = self._prefill(now_s, length_s, chunk_s, batch, kv_tokens)
        if not self.decoding:
            return []
        decode_s = self.roofline.step_s(batch, kv_tokens)
        chunked = busy_s / chunk_s
        plain = (length_s - busy_s) / decode_s
        slow = (chunked if chunk_s > slow_s else 0.0) + (plain if decode_s > slow_s else 0.0)
        return self._decode(now_s, length_s, chunked + plain, slow)

    def _prefill(self, now_s: float, length_s: float, chunk_s: float, batch: int, kv_tokens: int) -> float:
        """Prefill in order of arrival until the time is over; returns the time spent."""
        end_s, busy_s = now_s + length_s, 0.0
        clock_s = max(now_s, self.prefill_clock_s)
        rate = CHUNK_TOKENS / chunk_s
        if self.foreign_tokens > 0:
            spent_s = min(self.foreign_tokens / rate, end_s - clock_s)
            self.foreign_tokens = max(0.0, self.foreign_tokens - spent_s * rate)
            clock_s, busy_s = clock_s + spent_s, spent_s
        while self.prefills:
            sequence = self.prefills[0]
            start_s = max(clock_s, sequence.ready_s)
            if start_s >= end_s:
                break
            one_step_s = self.roofline.step_s(batch, kv_tokens, min(CHUNK_TOKENS, int(sequence.prefill_left) + 1))
            need_s = max(sequence.prefill_left / rate, one_step_s)
            spent_s = min(need_s, end_s - start_s)
            busy_s += min(spent_s, end_s - start_s)
            clock_s = start_s + spent_s
            if spent_s < need_s:
                sequence.prefill_left *= 1.0 - spent_s / need_s
                break
            self._start_decoding(self.prefills.popleft(), clock_s)
        self.prefill_clock_s = clock_s
        return min(busy_s, length_s)

    def _start_decoding(self, sequence: Sequence, now_s: float) -> None:
        sequence.prefill_left = 0.0
        sequence.ready_s = now_s
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        if sequence.preempted_s is not None:
            sequence.resumes.append((now_s - sequence.preempted_s, sequence.context))
            sequence.preempted_s = None
        sequence.generated += 1.0
        self.decoding[sequence.item_id] = sequence

    def _decode(self, now_s: float, length_s: float, steps: float, slow: float) -> list[Sequence]:
        finished = []
        for sequence in self.decoding.values():
            share = min(1.0, max(0.0, (now_s + length_s - sequence.ready_s) / length_s))
            made = steps * share
            left = sequence.request.output_tokens - sequence.generated
            if left <= made:
                start_s = max(now_s, sequence.ready_s)
                sequence.finished_s = start_s + (left / made if made else 0.0) * share * length_s
                finished.append(sequence)
                made = left
            sequence.generated += made
            sequence.slow_tokens += slow * share
        return finished
