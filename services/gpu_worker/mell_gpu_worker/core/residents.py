"""The sequences here, in the batch and towards their frontends at once: each way in or out keeps both in step."""

from mell_gpu_worker.core.batching import Batcher
from mell_gpu_worker.core.commands import Command, PublishEvent, PublishTokens
from mell_gpu_worker.core.sequence import Order, Phase, Sequence
from mell_gpu_worker.core.streams import Streams
from mell_gpu_worker.core.tokens import tables_from
from mell_shared.messages.sampling import FinishReason
from mell_shared.messages.scheduler import SequenceFinished
from mell_shared.messages.worker import SubmitAccepted


class Residents:
    """All sequences of `worker`. Methods return what is to be said of the change."""

    def __init__(self, worker: str, batcher: Batcher, streams: Streams) -> None:
        self.worker = worker
        self.batcher = batcher
        self.streams = streams
        self.stepped_us = 0
        """When the last step ended, and its tokens were made."""
        self._arrivals = 0

    @property
    def live(self) -> list[Sequence]:
        """Those that have not ended, the running ones first; who is unclaimed is somebody else's."""
        return [row for row in (*self.batcher.running, *self.batcher.waiting) if not row.unclaimed]

    def next_order(self, priority: int, since_us: int) -> Order:
        """Put what asks for room here in its place."""
        self._arrivals += 1
        return Order(-priority, since_us, self._arrivals)

    def admit(self, sequence: Sequence, now_us: int) -> SubmitAccepted | None:
        """Run and know `sequence` if it fits now; else change nothing and return None."""
        if not self.batcher.admit(sequence):
            return None
        return self._know(sequence, now_us)

    def admit_ended(self, sequence: Sequence, now_us: int) -> SubmitAccepted:
        """Know a sequence whose output is complete already; `finish` and `send_again` are to follow."""
        sequence.phase = Phase.ENDED
        return self._know(sequence, now_us)

    def _know(self, sequence: Sequence, now_us: int) -> SubmitAccepted:
        reply = SubmitAccepted(cached_tokens=sequence.cached_tokens)
        self.streams.add(sequence, reply, now_us)
        return reply

    def finish(self, sequence: Sequence, reason: FinishReason) -> Command:
        """Note why a sequence, out of the batch by now, has ended; tells the schedulers."""
        sequence.finish_reason = reason
        return PublishEvent(
            SequenceFinished(
                worker=self.worker, sequence=sequence.sequence, generation=sequence.generation, reason=reason
            )
        )

    def give_up(self, sequence: Sequence, now_us: int) -> list[Command]:
        """Stop a sequence that nobody wants from here any more, and keep nothing of it but its key."""
        said: list[Command] = []
        if sequence.live:
            self.batcher.end(sequence)
            told = self.finish(sequence, "cancelled")
            # One that was about to move may have done so: then it has not ended.
            said = [] if sequence.halted else [told]
        self.streams.forget(sequence, now_us)
        return said

    def leave(self, sequence: Sequence, now_us: int) -> None:
        """Keep nothing but the key of a sequence that goes on elsewhere."""
        if sequence.live:
            self.batcher.end(sequence)
            sequence.finish_reason = "cancelled"
        self.streams.forget(sequence, now_us)

    def join(self, sequence: Sequence, now_us: int) -> list[Command]:
        """Know a sequence that came from elsewhere and is this worker's now; publishes what the frontend lacks."""
        assert not sequence.unclaimed
        said: list[Command] = []
        self.streams.add(sequence, SubmitAccepted(cached_tokens=sequence.cached_tokens), now_us)
        if not sequence.live:
            assert sequence.finish_reason is not None
            said.append(self.finish(sequence, sequence.finish_reason))
        if not sequence.live or sequence.outputs > sequence.submitted_outputs:
            said += self.send_again(sequence, sequence.submitted_outputs)
        return said

    def send_again(self, sequence: Sequence, first_index: int) -> list[Command]:
        """Publish all output from an index on, and the end if it has come."""
        tables = tables_from(sequence, first_index)
        return [PublishTokens(sequence.frontend, table.message(self.worker)) for table in tables]

    def check(self) -> None:
        """Assert that batch and streams agree on who is live."""
        self.batcher.check()
        known = {id(sequence) for sequence in self.streams if sequence.live}
        assert known == {id(sequence) for sequence in self.live}, "batch and streams disagree"
        assert all(sequence.finish_reason for sequence in self.streams if not sequence.live), "an end has no reason"
