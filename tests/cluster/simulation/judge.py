"""What must hold: watched from outside all processes, at every command that matters."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mell_frontend.generation import SequenceRequest
from mell_frontend.stream.commands import DeliverTokens, FailSequence
from mell_frontend.stream.events import TokensArrived
from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.fake import expected_output
from mell_shared.messages.frontend import Claim, FrontendReply, Granted, TokensGenerated
from mell_shared.messages.worker import Migrate, Submit
from mell_shared.models import FAKE_EOS_ID
from tests.cluster.simulation.clock import EventQueue
from tests.cluster.simulation.story import Story

if TYPE_CHECKING:
    from tests.cluster.simulation.worker import WorkerProcess


@dataclass(slots=True)
class Reader:
    """One client: what it must get, what it got, how it ended."""

    request: SequenceRequest
    node: str
    limit: int
    expected: list[int]
    ids: list[int] = field(default_factory=list)
    end: str = ""
    """Why it ended; empty while it has not."""


class Judge:
    """Keeps who owns what, as the frontends' commands say, and what every reader got."""

    def __init__(self, queue: EventQueue, longest_tokens: int) -> None:
        self.readers: dict[str, Reader] = {}
        self.story = Story(queue)
        self._longest_tokens = longest_tokens
        self._owners: dict[tuple[str, int], str] = {}
        self._latest: dict[str, int] = {}
        """The last generation that was given to anybody."""
        self._publishers: dict[tuple[str, int], str] = {}
        self._moves: dict[str, tuple[str, int]] = {}

    def saw(self, process: str, event: object, commands: object) -> None:
        """Note what a core was told and what it wants."""
        self.story.handled(process, event, commands)

    # --- readers

    def opened(self, request: SequenceRequest, node: str) -> None:
        """A client begins to read."""
        room = self._longest_tokens - len(request.prompt_ids)
        limit = min(request.sampling.max_tokens or room, room)
        expected = expected_output(request.prompt_ids, request.sampling, limit)
        self.readers[request.sequence] = Reader(request, node, limit, expected)

    def closed(self, sequence: str, why: str) -> None:
        """A client stops reading, or loses its frontend."""
        reader = self.readers[sequence]
        reader.end = reader.end or why

    def delivered(self, command: DeliverTokens, cause: object) -> None:
        """Check what a reader gets, and whom it comes from."""
        if isinstance(cause, TokensArrived):
            self._check_owner(command.sequence, cause.message)
        reader = self.readers[command.sequence]
        assert not reader.end, f"{command.sequence} gets something after its end ({reader.end})"
        first = len(reader.ids)
        reader.ids += command.token_ids
        assert reader.ids == reader.expected[: len(reader.ids)], (
            f"{command.sequence} gets wrong tokens from index {first} on: {command.token_ids}, "
            f"expected {reader.expected[first : len(reader.ids)]}"
        )
        if reader.request.sampling.logprobs is not None:
            assert len(command.logprobs) == len(command.token_ids), f"{command.sequence} lacks log-probabilities"
        if command.finish_reason is not None:
            self._check_end(reader, command.finish_reason)
            reader.end = command.finish_reason

    def _check_owner(self, sequence: str, message: TokensGenerated) -> None:
        generation = message.generations[message.sequences.index(sequence)]
        latest = self._latest[sequence]
        assert generation == latest, f"{sequence} gets tokens of generation {generation}, it is in {latest}"
        owner = self._owners[sequence, generation]
        assert owner == message.worker, f"{sequence} gets tokens from {message.worker}, it belongs to {owner}"

    def _check_end(self, reader: Reader, reason: str) -> None:
        name = reader.request.sequence
        at_eos = bool(reader.ids) and reader.ids[-1] == FAKE_EOS_ID and not reader.request.sampling.ignore_eos
        assert reason == ("stop" if at_eos else "length"), f"{name} ends with {reason}"
        # Without a limit the worker's memory is one, and workers differ.
        if reason == "length" and reader.request.sampling.max_tokens is not None:
            assert len(reader.ids) == reader.limit, f"{name} ends after {len(reader.ids)} of {reader.limit} tokens"

    def failed(self, command: FailSequence) -> None:
        """A reader is told that it cannot go on."""
        reader = self.readers[command.sequence]
        assert not reader.end, f"{command.sequence} fails after its end ({reader.end})"
        reader.end = f"failed: {command.failure}: {command.message}"
        assert self._may_fail(reader, command), f"{command.sequence} was lost: {command.failure}: {command.message}"

    def _may_fail(self, reader: Reader, command: FailSequence) -> bool:
        """Only what is too large for all workers may, and, before it has begun, what is told so or to come later."""
        request = reader.request
        total = len(request.prompt_ids) + (request.sampling.max_tokens or 1)
        begun = (request.sequence, 1) in self._owners
        if begun:
            return command.failure == "too_large" and total > self._longest_tokens
        return command.failure in {"too_large", "queue_full"}

    def waits(self, sequence: str) -> None:
        """A reader is told to wait."""
        assert not self.readers[sequence].end, f"{sequence} waits after its end"

    # --- owners

    def submitted(self, submit: Submit, worker: str) -> None:
        """A frontend gives a generation to a worker."""
        reader = self.readers[submit.sequence]
        assert submit.output_ids == reader.ids, f"{submit.sequence} is submitted with other ids than were delivered"
        self._own(submit.sequence, submit.generation, worker)

    def answered(self, claim: Claim | None, reply: FrontendReply) -> None:
        """A frontend answers a worker."""
        if claim is not None and isinstance(reply, Granted):
            self._own(claim.sequence, reply.generation, claim.target)

    def _own(self, sequence: str, generation: int, worker: str) -> None:
        before = self._owners.setdefault((sequence, generation), worker)
        assert before == worker, f"generation {generation} of {sequence} belongs to {before} and to {worker}"
        assert generation >= self._latest.get(sequence, 0), f"{sequence} goes back to generation {generation}"
        self._latest[sequence] = generation

    # --- schedulers

    def ordered(self, order: Migrate) -> None:
        """A scheduler orders a move, under an id that no other has: workers take a repeat for the same move."""
        what = (order.sequence, order.generation)
        before = self._moves.setdefault(order.migration, what)
        assert before == what, f"move {order.migration} is of {before} and of {what}"

    # --- workers

    def published(self, worker: str, message: TokensGenerated) -> None:
        """Check what a worker publishes: only what is right, only as the one owner of that generation."""
        first = 0
        rows = zip(message.sequences, message.generations, message.first_indices, message.counts, strict=True)
        for name, generation, index, count in rows:
            publisher = self._publishers.setdefault((name, generation), worker)
            assert publisher == worker, f"{publisher} and {worker} both publish generation {generation} of {name}"
            assert self._owners.get((name, generation)) == worker, (
                f"{worker} publishes generation {generation} of {name}, which was never given to it"
            )
            ids = message.token_ids[first : first + count]
            expected = self.readers[name].expected[index : index + count]
            assert ids == expected, f"{worker} makes {ids} of {name} at index {index}, expected {expected}"
            first += count

    def step_began(self, worker: "WorkerProcess", rows: tuple[StepRow, ...]) -> frozenset[int]:
        """Check that a step stays within the worker's limits; returns the blocks that it writes to."""
        config = worker.core.config
        held = len(worker.core.batcher.running) + len(worker.core.batcher.arriving)
        assert held <= config.spec.max_sequences, f"{worker.name} holds {held} sequences"
        assert sum(row.count for row in rows) <= config.max_step_tokens, f"{worker.name} is over its token budget"
        return frozenset(self._check_writers(worker, rows))

    def step_ends(self, worker: "WorkerProcess", rows: tuple[StepRow, ...]) -> None:
        """Check that what the step wrote to was not given to anybody else meanwhile."""
        self._check_writers(worker, rows)

    def _check_writers(self, worker: "WorkerProcess", rows: tuple[StepRow, ...]) -> dict[int, str]:
        """Return who writes to which block; nobody writes to somebody else's, nor to one that is free."""
        batcher, size = worker.core.batcher, worker.core.config.spec.block_tokens
        writers: dict[int, str] = {}
        for row in rows:
            for place in range(row.start // size, -(-(row.start + row.count) // size)):
                block = row.block_table[place]
                assert writers.setdefault(block, row.sequence) == row.sequence, f"block {block} has two writers"
                assert batcher.pool.references(block), f"{row.sequence} writes to block {block}, which is free"
        for sequence in (*batcher.running, *batcher.arriving):
            for block in sequence.blocks:
                writer = writers.get(block, sequence.sequence)
                assert writer == sequence.sequence, f"{writer} writes block {block} of {sequence.sequence}"
        return writers
