"""A batcher, or a whole worker core, with a fake engine behind it and no clock, bus or thread."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mell_gpu_worker.core.batching import Batcher, Progress
from mell_gpu_worker.core.blocks import BlockPool, root_digest
from mell_gpu_worker.core.commands import AskStatus, Command, PublishEvent, PublishTokens, Reply, RunStep
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.events import CommandReceived, Event, StepFinished
from mell_gpu_worker.core.sequence import Limits, Order, accept
from mell_gpu_worker.core.sequence import Sequence as WorkerSequence
from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.core.worker import WorkerCore
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.codec import decode, encode
from mell_shared.messages.frontend import TOKENS_GENERATED
from mell_shared.messages.sampling import FinishReason, SamplingParams
from mell_shared.messages.scheduler import SCHEDULER_EVENT, WorkerSpec
from mell_shared.messages.worker import Submit, WorkerCommand, WorkerReply
from mell_shared.models import FAKE_EOS_ID, FAKE_MODEL, FAKE_VOCAB_SIZE

C = TypeVar("C")
BLOCK_TOKENS = 4
SECOND_US = 1_000_000


def fake_engine(kv_blocks: int, block_tokens: int = BLOCK_TOKENS) -> FakeEngine:
    """A fake engine without latency."""
    options = EngineOptions(
        engine="fake", model=FAKE_MODEL, model_dir=Path(), kv_blocks=kv_blocks, block_tokens=block_tokens
    )
    return FakeEngine(options)


def submit(sequence: str = "a", prompt: Iterable[int] = b"hello", **changes: Any) -> Submit:
    """A submission; sampling's fields and the submission's own may be given by name."""
    own = {name: changes.pop(name) for name in list(changes) if name in Submit.model_fields}
    sampling = SamplingParams(**{"seed": 1, "ignore_eos": True, "max_tokens": 4} | changes)
    fields = {"generation": 1, "frontend": "f1", "model": FAKE_MODEL, "sampling": sampling} | own
    return Submit(sequence=sequence, prompt_ids=list(prompt), **fields)


@dataclass
class BatchWorld:
    """A batcher and a fake engine, run step by step with all invariants checked."""

    kv_blocks: int = 16
    max_step_tokens: int = 16
    max_sequences: int = 8
    prefix_cache: bool = True
    ended: dict[str, FinishReason] = field(default_factory=dict)
    rows: list[StepRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = fake_engine(self.kv_blocks)
        self.batcher = Batcher(
            BlockPool(self.kv_blocks, BLOCK_TOKENS, prefix_cache=self.prefix_cache),
            root_digest("fake"),
            max_step_tokens=self.max_step_tokens,
            max_sequences=self.max_sequences,
        )
        self.limits = Limits(self.kv_blocks * BLOCK_TOKENS, frozenset({FAKE_EOS_ID}))
        self.arrivals = 0

    def offer(self, message: Submit) -> WorkerSequence | None:
        """Submit; returns the sequence if it was admitted."""
        sequence = accept(message, Order(-message.priority, 0, self.arrivals), self.limits)
        self.arrivals += 1
        admitted = self.batcher.admit(sequence)
        self.batcher.check()
        return sequence if admitted else None

    def take(self, message: Submit) -> WorkerSequence:
        """Submit what must be admitted."""
        sequence = self.offer(message)
        assert sequence is not None, f"{message.sequence} was not admitted"
        return sequence

    def plan(self) -> list[StepRow]:
        """Plan a step, checked against the budget and the block tables."""
        self.rows = self.batcher.plan()
        self.batcher.check()
        assert sum(row.count for row in self.rows) <= self.max_step_tokens, "over the token budget"
        assert len({row.sequence for row in self.rows}) == len(self.rows), "a sequence is in a step twice"
        self._check_writes()
        return self.rows

    def _check_writes(self) -> None:
        """No block is written by two rows, and none that another sequence holds."""
        writers: dict[int, str] = {}
        for row in self.rows:
            for position in range(row.start, row.start + row.count):
                block = row.block_table[position // BLOCK_TOKENS]
                assert writers.setdefault(block, row.sequence) == row.sequence, "a block has two writers"
        for sequence in self.batcher.running:
            for block in sequence.blocks:
                assert writers.get(block, sequence.sequence) == sequence.sequence, "a shared block is written"

    def finish_step(self) -> list[Progress]:
        """Let the engine compute the planned rows, and commit."""
        progress = self.batcher.commit(self.engine.execute(self.rows))
        self.batcher.check()
        self.ended |= {step.sequence.sequence: step.end for step in progress if step.end is not None}
        return progress

    def step(self) -> list[StepRow]:
        """Plan and finish one step; returns its rows' (sequence, start, count) as they were."""
        rows = self.plan()
        if rows:
            self.finish_step()
        return rows

    def shape(self) -> list[tuple[str, int, int]]:
        """Run a step; return (sequence, start, count) of each row."""
        return [(row.sequence, row.start, row.count) for row in self.step()]

    def run(self, limit: int = 10_000) -> None:
        """Step until nobody runs."""
        for _ in range(limit):
            if not self.step():
                assert not self.batcher.running, "somebody runs but nothing is computed"
                assert not self.batcher.waiting, "a preempted sequence never comes back"
                return
        raise AssertionError("the work does not end")


def worker_config(**changes: Any) -> WorkerConfig:
    """A small worker's configuration; fields of `WorkerConfig` and of `WorkerSpec` may be given by name."""
    spec: dict[str, Any] = {
        "worker": "w1",
        "name": "w",
        "host": "here",
        "model": FAKE_MODEL,
        "engine": "fake",
        "device": "cpu",
        "kv_layout": "fake-1-4",
        "max_model_len": 64,
        "kv_blocks": 16,
        "block_tokens": BLOCK_TOKENS,
        "max_sequences": 8,
        "migration_modes": (),
    }
    spec |= {name: changes.pop(name) for name in list(changes) if name in spec}
    own: dict[str, Any] = {
        "vocab_size": FAKE_VOCAB_SIZE,
        "eos_token_ids": (FAKE_EOS_ID,),
        "max_step_tokens": 32,
        "prefix_cache": True,
        "report_interval_us": SECOND_US,
        "status_interval_us": SECOND_US,
        "frontend_silence_us": 30 * SECOND_US,
        "stop_deadline_us": 10 * SECOND_US,
    }
    return WorkerConfig(spec=WorkerSpec(**spec), **(own | changes))


class CoreWorld:
    """A worker core with a fake engine, a clock turned by hand, and everything it wanted done in `commands`."""

    def __init__(self, **changes: Any) -> None:
        config = worker_config(**changes)
        self.engine = fake_engine(config.spec.kv_blocks)
        self.now_us = 0
        self.core = WorkerCore(config, 0)
        self.commands: list[Command] = []
        self.step: RunStep | None = None

    def tell(self, *events: Event, after_us: int = 0) -> list[Command]:
        """Let events happen; return what the core wants done, all messages having passed the wire."""
        self.now_us += after_us
        wanted: list[Command] = []
        for event in events:
            wanted += self.core.handle(event, self.now_us)
            self.core.check()
        for command in wanted:
            self._cross_the_wire(command)
            if isinstance(command, RunStep):
                assert self.step is None, "two steps at once"
                self.step = command
        self.commands += wanted
        return wanted

    @staticmethod
    def _cross_the_wire(command: Command) -> None:
        if isinstance(command, PublishTokens):
            assert decode(TOKENS_GENERATED, encode(command.message), unknown_fields="forbid") == command.message
        elif isinstance(command, PublishEvent):
            assert decode(SCHEDULER_EVENT, encode(command.message), unknown_fields="forbid") == command.message

    def ask(self, command: WorkerCommand, grammar_fault: str | None = None) -> WorkerReply:
        """Send a command; return the reply, which must be the only one."""
        replies = only(Reply, self.tell(CommandReceived(command, "inbox", grammar_fault)))
        assert [reply.reply_to for reply in replies] == ["inbox"]
        return replies[0].message

    def finish_step(self) -> list[Command]:
        """Let the engine finish the step under way."""
        assert self.step is not None, "no step is under way"
        step, self.step = self.step, None
        return self.tell(StepFinished(self.engine.execute(step.rows)))

    def run(self) -> list[Command]:
        """Finish steps until none is wanted; return all commands of these."""
        start = len(self.commands)
        while self.step is not None:
            self.finish_step()
        return self.commands[start:]

    def output(self, sequence: str = "a", generation: int = 1) -> list[int]:
        """The tokens published for a key so far, each index once; a gap fails."""
        made: dict[int, int] = {}
        for command in only(PublishTokens, self.commands):
            for first, ids in rows_of(command, sequence, generation):
                made |= dict(enumerate(ids, first))
        assert sorted(made) == list(range(min(made, default=0), max(made, default=-1) + 1)), "a gap"
        return [made[index] for index in sorted(made)]


def only(kind: type[C], commands: Sequence[Command]) -> list[C]:
    """The commands of one kind."""
    return [command for command in commands if isinstance(command, kind)]


def rows_of(command: PublishTokens, sequence: str, generation: int = 1) -> list[tuple[int, list[int]]]:
    """(first index, token ids) of each row of a message that belongs to a key."""
    rows, start, message = [], 0, command.message
    columns = zip(message.sequences, message.generations, message.first_indices, message.counts, strict=True)
    for name, own_generation, first, count in columns:
        if (name, own_generation) == (sequence, generation):
            rows.append((first, message.token_ids[start : start + count]))
        start += count
    return rows


def asked(commands: Sequence[Command]) -> dict[str, AskStatus]:
    """The statuses asked, by frontend."""
    return {command.frontend: command for command in only(AskStatus, commands)}
