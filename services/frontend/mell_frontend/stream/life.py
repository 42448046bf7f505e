"""A sequence's way through the states: placing, submitting, losing an owner, ending."""

from itertools import count

from mell_frontend.generation import SequenceRequest
from mell_frontend.stream.book import Book, PendingCancel
from mell_frontend.stream.commands import (
    AskPlacement,
    CancelSequence,
    Command,
    DeliverTokens,
    FailSequence,
    SubmitSequence,
    TellWaiting,
)
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream.sequence import Sequence
from mell_frontend.stream.states import Cause, State
from mell_frontend.stream.stats import StreamStats


class Life:
    """Moves sequences from state to state; every change of owner or generation but a granted claim is here."""

    def __init__(self, frontend: str, limits: StreamLimits, book: Book, stats: StreamStats) -> None:
        self._frontend = frontend
        self._limits = limits
        self._book = book
        self._stats = stats
        self._asks = count(1)

    def open(self, request: SequenceRequest, now_us: int) -> list[Command]:
        """Begin to place a new sequence."""
        if len(self._book.open) >= self._limits.max_sequences:
            self._stats.sequences_failed += 1
            message = f"{self._limits.max_sequences} sequences are open here already; try again later"
            return [FailSequence(request.sequence, "queue_full", message, retry_after_s=1.0)]
        wanted = request.sampling.max_tokens
        limit = min(wanted or self._limits.max_output_tokens, self._limits.max_output_tokens)
        sequence = Sequence(request, opened_us=now_us, output_limit=limit, progressed_us=now_us)
        self._book.add(sequence)
        self._stats.sequences_opened += 1
        return [self.place(sequence, now_us)]

    def place(self, sequence: Sequence, now_us: int, cause: str = "") -> Command:
        """Ask the scheduler; the sequence is PLACING already."""
        assert sequence.state is State.PLACING
        sequence.ask = next(self._asks)
        sequence.asked_us = now_us
        return AskPlacement(sequence.ask, sequence.place_request(self._frontend, now_us), cause)

    def pause(self, sequence: Sequence, cause: Cause, until_us: int) -> None:
        """Ask the scheduler again at that time."""
        sequence.move(cause)
        sequence.retry_at_us = until_us
        self._book.backing_off[sequence.name] = sequence

    def resume(self, now_us: int) -> list[Command]:
        """Ask again for the sequences whose pause is over."""
        due = [s for s in self._book.backing_off.values() if s.retry_at_us <= now_us]
        commands: list[Command] = []
        for sequence in due:
            del self._book.backing_off[sequence.name]
            sequence.move(Cause.PAUSE_OVER)
            commands.append(self.place(sequence, now_us))
        return commands

    def submit(self, sequence: Sequence, worker: str, now_us: int) -> list[Command]:
        """Give the sequence to the worker that the scheduler named."""
        sequence.move(Cause.PLACED)
        self._book.give(sequence, worker, now_us)
        sequence.ask = next(self._asks)
        sequence.asked_us = now_us
        self._stats.submissions += 1
        return [SubmitSequence(worker, sequence.ask, sequence.submit(self._frontend))]

    def owner_has_it(self, sequence: Sequence) -> None:
        """Note any proof that the owner runs the sequence: its answer, its tokens, its status."""
        if sequence.state is State.SUBMITTING:
            sequence.move(Cause.ACCEPTED)
            self.note_streaming(sequence)

    def note_streaming(self, sequence: Sequence) -> None:
        """Forget the troubles of placing."""
        sequence.excluded = ()
        sequence.pauses = 0
        sequence.unanswered_since_us = None

    def place_elsewhere(self, sequence: Sequence, cause: Cause, why: str, now_us: int) -> list[Command]:
        """Take the sequence from its owner, who certainly gave it up or never had it, and place it again."""
        worker = self._book.take(sequence)
        if sequence.full:
            # Only the end was missing, and nothing but the limit can have ended it here.
            last = DeliverTokens(sequence.name, [], (), "length", sequence.cached_tokens)
            return self.finish(sequence, last, now_us)
        if cause is not Cause.EVICTED:
            sequence.setbacks += 1
        if sequence.setbacks > self._limits.max_setbacks:
            message = f"given up after {sequence.setbacks} submissions in a row came to nothing; the last: {why}"
            return self.fail(sequence, FailSequence(sequence.name, "unavailable", message), now_us)
        if cause is not Cause.REFUSED_HERE:
            self._stats.resubmissions += 1
        if worker not in sequence.excluded:
            sequence.excluded = (*sequence.excluded, worker)
        sequence.move(cause)
        return [TellWaiting(sequence.name, 0), self.place(sequence, now_us, why)]

    def lose(self, sequence: Sequence, cause: Cause, why: str, now_us: int) -> list[Command]:
        """Place a sequence again whose owner may still run it: tell that one to stop, in case it hears."""
        assert sequence.owner is not None
        stop = CancelSequence(sequence.owner, sequence.cancel())
        return [stop, *self.place_elsewhere(sequence, cause, why, now_us)]

    def finish(self, sequence: Sequence, last: DeliverTokens, now_us: int) -> list[Command]:
        """End a sequence all of whose tokens were accepted; `last` holds the finish reason."""
        assert last.finish_reason is not None
        sequence.move(Cause.FINISHED)
        self._book.end(sequence, now_us)
        self._stats.sequences_finished += 1
        return [last]

    def finish_at_limit(self, sequence: Sequence, last: DeliverTokens, now_us: int) -> list[Command]:
        """End a sequence whose owner goes on beyond its limit, and stop the owner."""
        return [*self._cancel(sequence), *self.finish(sequence, last, now_us)]

    def fail(self, sequence: Sequence, failure: FailSequence, now_us: int) -> list[Command]:
        """End a sequence that cannot go on and that no worker runs."""
        sequence.move(Cause.FAILED)
        self._book.end(sequence, now_us)
        self._stats.sequences_failed += 1
        return [failure]

    def stop_and_fail(self, sequence: Sequence, failure: FailSequence, now_us: int) -> list[Command]:
        """End a sequence that cannot go on, and stop the owner, who may still run it."""
        return [*self._cancel(sequence), *self.fail(sequence, failure, now_us)]

    def close(self, name: str, now_us: int) -> list[Command]:
        """End a sequence that nobody reads any more; one that has ended needs nothing."""
        sequence = self._book.open.get(name)
        if sequence is None:
            return []
        sequence.move(Cause.CLOSED)
        self._stats.sequences_closed += 1
        commands = self._cancel(sequence)
        self._book.end(sequence, now_us)
        return commands

    def retry_cancels(self, now_us: int) -> list[Command]:
        """Repeat the cancels that went unanswered."""
        due = [c for c in self._book.cancels.values() if c.retry_at_us is not None and c.retry_at_us <= now_us]
        for pending in due:
            pending.retry_at_us = None
        return [CancelSequence(pending.worker, pending.message) for pending in due]

    def _cancel(self, sequence: Sequence) -> list[Command]:
        if sequence.owner is None:
            return []
        pending = PendingCancel(sequence.owner, sequence.cancel(), retry_at_us=None)
        self._book.cancels[sequence.name] = pending
        return [CancelSequence(pending.worker, pending.message)]
