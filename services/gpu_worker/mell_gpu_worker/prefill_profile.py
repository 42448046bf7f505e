"""Measures at start how much a worker can prefill beside its decodes (MELL §V: the compute boundary of a transfer).

A step of some decodes is timed, then the same with ever longer chunks of a prompt, until it takes longer by the share
that is allowed. The rate is those tokens for each such step. Only before anything is served: it writes to the pool.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.base import Engine
from mell_shared.clock import Clock
from mell_shared.messages.sampling import SamplingParams

BATCHES = (1, 8, 32, 128)
"""Numbers of decodes beside which prefill is measured."""
_CONTEXT_TOKENS = 128
_FIRST_CHUNK = 16
_GROWTH = 4
_REPEATS = 3
_GREEDY = SamplingParams(temperature=0, seed=0, ignore_eos=True)

Profile = tuple[tuple[int, int], ...]
"""(batch, tokens per second), ascending by batch."""


@dataclass(frozen=True, slots=True)
class ProfileLimits:
    """What the measurement may take, and what it measures against."""

    seconds: float
    stretch: float
    """Share by which prefill may lengthen a step of decodes."""
    max_sequences: int
    max_step_tokens: int


def profile_prefill(engine: Engine, limits: ProfileLimits, clock: Clock) -> Profile:
    """Return the rates measured within the time; fewer if it runs out, none if steps take no time. Blocks."""
    deadline_us = clock.now_us() + round(limits.seconds * 1e6)
    spec = engine.spec
    context = min(_CONTEXT_TOKENS, spec.max_model_len, spec.kv_blocks * spec.block_tokens // 4)
    longest = min(limits.max_step_tokens, spec.max_model_len)
    blocks_each = -(-context // spec.block_tokens)
    found: list[tuple[int, int]] = []
    for batch in BATCHES:
        most_chunk = min(longest - batch, (spec.kv_blocks - batch * blocks_each) * spec.block_tokens)
        if batch > limits.max_sequences or most_chunk < _FIRST_CHUNK or context < 1:
            break
        steps = _Steps(engine, batch, context, lambda: clock.now_us() >= deadline_us)
        rate = _rate(steps, most_chunk, limits.stretch)
        if rate is None:
            break
        found.append((batch, rate))
    return tuple(found)


class _Steps:
    """Steps of `batch` decodes at `context` tokens each, alone or with a chunk of prefill beside them."""

    def __init__(self, engine: Engine, batch: int, context: int, late: Callable[[], bool]) -> None:
        self._engine = engine
        self._late = late
        size = engine.spec.block_tokens
        each = -(-context // size)
        ids = [0] * context
        self._decodes = [
            StepRow(f"profile-{row}", ids, 1, context - 1, 1, range(row * each, (row + 1) * each), _GREEDY)
            for row in range(batch)
        ]
        self._free = range(batch * each, engine.spec.kv_blocks)
        self._size = size

    def took_us(self, chunk: int) -> float | None:
        """Return the median time of a step with `chunk` tokens of prefill; None when time is up."""
        rows = list(self._decodes)
        if chunk:
            table = self._free[: -(-chunk // self._size)]
            rows.append(StepRow("profile-prefill", [0] * chunk, chunk, 0, chunk, table, None))
        self._engine.execute(rows)  # the first of its shape may compile or allocate
        times = []
        for _ in range(_REPEATS):
            if self._late():
                return None
            times.append(self._engine.execute(rows).step_us)
        return statistics.median(times)


def _rate(steps: _Steps, most_chunk: int, stretch: float) -> int | None:
    """Return the tokens per second that lengthen a step by `stretch`, by interpolation; None if not to be had."""
    alone_us = steps.took_us(0)
    if not alone_us:
        return None
    allowed_us = alone_us * (1 + stretch)
    before, before_us, chunk = 0, alone_us, min(_FIRST_CHUNK, most_chunk)
    while True:
        took_us = steps.took_us(chunk)
        if took_us is None:
            return None
        if took_us >= allowed_us or chunk == most_chunk:
            break
        before, before_us, chunk = chunk, max(before_us, took_us), min(chunk * _GROWTH, most_chunk)
    if took_us > allowed_us:
        share = (allowed_us - before_us) / (took_us - before_us)
        return round((before + (chunk - before) * share) * 1e6 / allowed_us)
    return round(chunk * 1e6 / took_us)
