"""Drives an engine as a worker's core would, only wilder: random mixes of rows, chunks, shared blocks, preemption."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from mell_gpu_worker.core.step import StepResult, StepRow
from mell_gpu_worker.engine.torch_engine import TorchEngine
from mell_shared.messages.sampling import SamplingParams
from tests.gpu_worker.engine.families import VOCAB

GREEDY = SamplingParams(temperature=0, seed=0)


@dataclass
class Job:
    """One sequence: its ids so far, how much of them has KV, and in which blocks."""

    name: str
    ids: list[int]
    prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams = GREEDY
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        """What was generated."""
        return self.ids[self.prompt_tokens :]

    @property
    def done(self) -> bool:
        """Whether it has all its tokens."""
        return len(self.output) >= self.max_tokens


def some_jobs(seed: int) -> list[Job]:
    """Return jobs of unequal lengths."""
    source = random.Random(seed)
    jobs = []
    for number in range(8):
        prompt = [source.randrange(VOCAB) for _ in range(source.choice([1, 7, 20, 50]))]
        jobs.append(Job(f"job-{number}", prompt, len(prompt), max_tokens=source.randint(8, 24)))
    return jobs


class Driver:
    """Runs jobs to their ends. Blocks are handed out in random order and filled with NaN when they come back."""

    def __init__(self, engine: TorchEngine, seed: int, *, most_chunk: int = 24) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.most_chunk = most_chunk
        self.size = engine.spec.block_tokens
        self.free = list(range(engine.spec.kv_blocks))
        self.users = [0] * engine.spec.kv_blocks
        self.random.shuffle(self.free)
        self.preemptions = 0
        self.prefix_hits = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Step until all jobs are done."""
        waiting, running = list(jobs), list[Job]()
        while waiting or running:
            if waiting and (not running or self.random.random() < 0.4):
                running.append(self._admit(waiting.pop(0), running))
            if running and self.random.random() < 0.05:
                self._preempt(self.random.choice(running))
            batch = [job for job in running if self.random.random() < 0.8] or running
            self.step(batch)
            for job in [job for job in running if job.done]:
                running.remove(job)
                self._release(job)

    def step(self, batch: Sequence[Job]) -> StepResult:
        """Run one step with a part of each job in `batch`, in random order."""
        batch = self.random.sample(list(batch), len(batch))
        rows = [self._row(job) for job in batch]
        result = self.engine.execute(rows)
        assert not result.failed
        for job, row, sampled in zip(batch, rows, result.sampled, strict=True):
            job.computed += row.count
            assert (sampled is None) == (row.sampling is None)
            if sampled is not None:
                job.ids.append(sampled.token_id)
        return result

    def _row(self, job: Job) -> StepRow:
        left = len(job.ids) - job.computed
        count = min(left, self.random.randint(1, self.most_chunk))
        self._grow(job, job.computed + count)
        last = job.computed + count == len(job.ids)
        sampling = job.sampling if last else None
        return StepRow(job.name, job.ids, job.prompt_tokens, job.computed, count, job.blocks, sampling)

    def _grow(self, job: Job, tokens: int) -> None:
        while len(job.blocks) * self.size < tokens:
            block = self.free.pop()
            self.users[block] = 1
            job.blocks.append(block)

    def _admit(self, job: Job, running: Sequence[Job]) -> Job:
        """Let the job begin on full blocks of another one that starts with the same ids."""
        for other in running:
            same = 0
            limit = min(len(job.ids) - 1, other.computed)
            while same < limit and job.ids[same] == other.ids[same]:
                same += 1
            shared = same // self.size
            if shared:
                job.blocks = other.blocks[:shared]
                job.computed = shared * self.size
                for block in job.blocks:
                    self.users[block] += 1
                self.prefix_hits += 1
                break
        return job

    def _preempt(self, job: Job) -> None:
        self._release(job)
        self.preemptions += 1

    def _release(self, job: Job) -> None:
        for block in job.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.engine.pool.data[block] = float("nan")
                self.free.insert(self.random.randint(0, len(self.free)), block)
        job.blocks, job.computed = [], 0
