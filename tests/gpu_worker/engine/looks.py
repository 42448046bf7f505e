"""Runs sequences on any engine as a worker's core does: whole steps or looks, rows pending, ends told by either."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from mell_gpu_worker.core.step import SampledToken, StepRow
from mell_gpu_worker.engine.base import Engine
from mell_shared.messages.sampling import FinishReason, SamplingParams

_PATIENCE_S = 60.0
"""Only ends a test that has failed."""


@dataclass
class Job:
    """One sequence: its ids, and what became of it. `given` of the ids are output from before."""

    ids: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    computed: int = 0
    table: list[int] = field(default_factory=list)
    sampled: list[SampledToken] = field(default_factory=list)
    end: FinishReason | None = None
    failure: str = ""

    @property
    def output(self) -> list[int]:
        """All output so far."""
        return self.ids[self.prompt_tokens :]


def job(prompt: list[int], sampling: SamplingParams, output: list[int] | None = None) -> Job:
    """A new sequence, or one that goes on after `output`."""
    return Job([*prompt, *(output or [])], len(prompt), sampling)


class Looks:
    """Jobs on one engine. Blocks are never given back: the engine must have enough."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._blocks = 0
        self.pending = 0

    def run(self, jobs: Mapping[str, Job], tokens: int, chunk: int = 1 << 20) -> None:
        """Step until each has ended, failed or made `tokens` tokens here; prompts come in chunks of `chunk`."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while running := {
            name: each for name, each in jobs.items() if not (each.end or each.failure) and len(each.sampled) < tokens
        }:
            assert time.monotonic() < deadline_s, f"no end: {running}"
            self.step(running, chunk)

    def step(self, jobs: Mapping[str, Job], chunk: int = 1 << 20) -> None:
        """One step over these."""
        names = list(jobs)
        rows = [self._row(name, jobs[name], chunk) for name in names]
        result = self.engine.execute(rows)
        assert len(result.sampled) == len(rows)
        assert not result.pending & result.failed.keys()
        self.pending += len(result.pending)
        for place, name in enumerate(names):
            if place not in result.pending:
                self._take(jobs[name], rows[place], result.sampled[place])
                jobs[name].failure = result.failed.get(place, "")
                jobs[name].end = result.ended.get(place)

    @staticmethod
    def _take(each: Job, row: StepRow, sampled: SampledToken | None) -> None:
        each.computed += row.count
        if sampled is not None:
            assert row.sampling is not None, "a token nobody asked for"
            each.ids.append(sampled.token_id)
            each.sampled.append(sampled)

    def _row(self, name: str, each: Job, chunk: int) -> StepRow:
        left = len(each.ids) - each.computed
        count = min(left, chunk)
        needed = -(-(each.computed + count) // self.engine.spec.block_tokens)
        while len(each.table) < needed:
            each.table.append(self._blocks)
            self._blocks += 1
        assert self._blocks <= self.engine.spec.kv_blocks, "the test needs a larger pool"
        sampling = each.sampling if count == left else None
        return StepRow(name, each.ids, each.prompt_tokens, each.computed, count, each.table, sampling)
