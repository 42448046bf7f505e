"""Commands for one sequence and the answers to them, idempotent by (sequence, generation)."""

from mell_gpu_worker.core.admission import AdmissionRules
from mell_gpu_worker.core.commands import Command
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.sequence import Limits, accept
from mell_shared.messages.worker import (
    Cancel,
    CancelDone,
    Resend,
    ResendDone,
    Submit,
    SubmitRefused,
    WorkerReply,
)

Answer = tuple[WorkerReply, list[Command]]
"""The reply, and what it leads to."""


class Desk:
    """Takes submissions, cancellations and requests to send again. Once `closed` it takes no submission."""

    def __init__(self, config: WorkerConfig, residents: Residents) -> None:
        self.closed = False
        self._residents = residents
        self._streams = residents.streams
        self._rules = AdmissionRules(config.spec, config.vocab_size, config.can)
        self._limits = Limits(config.spec.max_total_tokens, frozenset(config.eos_token_ids))

    def submit(self, submit: Submit, grammar_fault: str | None, now_us: int) -> Answer:
        """Run a sequence, or say why not; an older generation of it is given up either way."""
        key = (submit.sequence, submit.generation)
        first = self._streams.first_reply(*key)
        if first is not None:
            return first, []
        newest = self._streams.newest_generation(submit.sequence)
        if submit.generation < newest:
            text = f"generation {submit.generation} is over, {newest} is known here"
            return SubmitRefused(reason="superseded", message=text), []
        older = self._streams.older(*key)
        said = [] if older is None else self._residents.give_up(older, now_us)
        refused = self._refusal(submit, grammar_fault)
        reply, more = (refused, []) if refused else self._admit(submit, now_us)
        if isinstance(reply, SubmitRefused):
            self._streams.remember(*key, reply, now_us)
        return reply, said + more

    def _refusal(self, submit: Submit, grammar_fault: str | None) -> SubmitRefused | None:
        if self.closed:
            return SubmitRefused(
                reason="stopping", message="this worker takes nothing new: it is drained or about to stop"
            )
        return self._rules.refusal(submit, grammar_fault)

    def _admit(self, submit: Submit, now_us: int) -> Answer:
        sequence = accept(submit, self._residents.next_order(submit.priority, now_us), self._limits)
        end = sequence.end_reason() if sequence.outputs else None
        if end is not None:
            reply = self._residents.admit_ended(sequence, now_us)
            said = [self._residents.finish(sequence, end)]
            return reply, said + self._residents.send_again(sequence, sequence.outputs)
        accepted = self._residents.admit(sequence, now_us)
        if accepted is not None:
            return accepted, []
        free = self._residents.batcher.pool.free_blocks
        text = f"{len(sequence.token_ids)} tokens do not fit now: {free} KV blocks are free"
        return SubmitRefused(reason="no_room", message=text), []

    def cancel(self, cancel: Cancel, now_us: int) -> Answer:
        """Stop and forget a sequence, if it is here in this generation."""
        sequence = self._streams.find(cancel.sequence, cancel.generation)
        if sequence is not None:
            return CancelDone(), self._residents.give_up(sequence, now_us)
        if cancel.generation > self._streams.newest_generation(cancel.sequence):
            # Its submission may still be under way, and must not start anything when it comes.
            refused = SubmitRefused(reason="superseded", message="cancelled before it arrived")
            self._streams.remember(cancel.sequence, cancel.generation, refused, now_us)
        return CancelDone(), []

    def resend(self, resend: Resend) -> Answer:
        """Publish again what a frontend misses, if it is here."""
        sequence = self._streams.find(resend.sequence, resend.generation)
        if sequence is None:
            return ResendDone(known=False), []
        return ResendDone(known=True), self._residents.send_again(sequence, resend.first_index)
