"""What the scheduler and the worker answer while a sequence looks for an owner."""

from mell_frontend.stream.book import Book
from mell_frontend.stream.commands import Command, FailSequence, FailureKind, TellWaiting
from mell_frontend.stream.events import PlaceAnswered, PlaceFailed, SubmitAnswered, SubmitFailed, SubmitTooLong
from mell_frontend.stream.life import Life
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream.sequence import Sequence
from mell_frontend.stream.states import Cause, State
from mell_shared.messages.scheduler import Placed, Queued, Rejected, RejectReason
from mell_shared.messages.worker import CommandInvalid, SubmitAccepted, SubmitRefusal, SubmitRefused

REJECTED_AS: dict[RejectReason, FailureKind] = {
    "queue_full": "queue_full",
    "no_worker": "unavailable",
    "too_large": "too_large",
    "unknown_model": "unknown_model",
}
REFUSED_AS: dict[SubmitRefusal, FailureKind] = {
    "too_large": "too_large",
    "wrong_model": "unknown_model",
    "bad_request": "refused",
    "protocol": "failed",
}
"""Refusals that another worker would repeat; the others are answered by placing again."""


class Placing:
    """Takes answers to asks; one to an ask that is no longer outstanding changes nothing."""

    def __init__(self, limits: StreamLimits, book: Book, life: Life) -> None:
        self._limits = limits
        self._book = book
        self._life = life

    def place_answered(self, event: PlaceAnswered, now_us: int) -> list[Command]:
        """Submit, wait, or fail, as the scheduler says."""
        sequence = self._waiting(event.sequence, event.ask, State.PLACING)
        if sequence is None:
            return []
        match event.reply:
            case Placed(worker=worker):
                sequence.unanswered_since_us = None
                return self._life.submit(sequence, worker, now_us)
            case Queued() as reply:
                return self._queued(sequence, reply, now_us)
            case Rejected() as reply:
                return self._rejected(sequence, reply, now_us)

    def place_failed(self, event: PlaceFailed, now_us: int) -> list[Command]:
        """Ask again after a pause, up to the deadline."""
        sequence = self._waiting(event.sequence, event.ask, State.PLACING)
        if sequence is None:
            return []
        message = f"no scheduler answers ({event.failure.replace('_', ' ')}); is one running?"
        return self._again_or_fail(sequence, FailSequence(sequence.name, "unavailable", message), now_us)

    def submit_answered(self, event: SubmitAnswered, now_us: int) -> list[Command]:
        """Stream, place elsewhere, or fail, as the worker says."""
        sequence = self._waiting(event.sequence, event.ask, State.SUBMITTING)
        if sequence is None:
            return []
        assert sequence.owner is not None
        self._book.hear(sequence.owner, now_us)
        match event.reply:
            case SubmitAccepted(cached_tokens=cached_tokens):
                if sequence.accepted == 0:
                    sequence.cached_tokens = cached_tokens
                self._life.owner_has_it(sequence)
                return []
            case SubmitRefused() as reply:
                return self._refused(sequence, reply, now_us)
            case CommandInvalid(message=message):
                said = f"the worker could not read the request: {message}"
                return self._life.fail(sequence, FailSequence(sequence.name, "failed", said), now_us)

    def submit_failed(self, event: SubmitFailed, now_us: int) -> list[Command]:
        """Place the sequence elsewhere under a new generation: the worker may or may not run this one."""
        sequence = self._waiting(event.sequence, event.ask, State.SUBMITTING)
        if sequence is None:
            return []
        why = f"worker {sequence.owner} did not answer ({event.failure.replace('_', ' ')})"
        if event.failure in {"timeout", "invalid"}:
            return self._life.lose(sequence, Cause.SUBMIT_LOST, why, now_us)
        return self._life.place_elsewhere(sequence, Cause.SUBMIT_LOST, why, now_us)

    def submit_too_long(self, event: SubmitTooLong, now_us: int) -> list[Command]:
        """Fail: no message of that length can reach a worker."""
        sequence = self._waiting(event.sequence, event.ask, State.SUBMITTING)
        if sequence is None:
            return []
        message = f"the request is too long for the broker, which takes about {event.limit_tokens} tokens"
        failure = FailSequence(sequence.name, "too_large", message, limit_tokens=event.limit_tokens)
        return self._life.fail(sequence, failure, now_us)

    def _waiting(self, name: str, ask: int, state: State) -> Sequence | None:
        sequence = self._book.open.get(name)
        if sequence is None or sequence.ask != ask or sequence.state is not state:
            return None
        return sequence

    def _queued(self, sequence: Sequence, reply: Queued, now_us: int) -> list[Command]:
        sequence.excluded = ()  # what refused or lost it has had time to mend
        sequence.unanswered_since_us = None
        sequence.pauses = 0
        tell = TellWaiting(sequence.name, reply.position)
        # The scheduler holds its reply; one that does not must not be asked in a tight loop.
        earliest_us = sequence.asked_us + self._limits.queue_pause_us
        if now_us < earliest_us:
            self._life.pause(sequence, Cause.QUEUED_TOO_SOON, earliest_us)
            return [tell]
        sequence.move(Cause.QUEUED)
        return [tell, self._life.place(sequence, now_us)]

    def _rejected(self, sequence: Sequence, reply: Rejected, now_us: int) -> list[Command]:
        kind = REJECTED_AS[reply.reason]
        failure = FailSequence(sequence.name, kind, reply.message, reply.retry_after_s, reply.limit_tokens)
        # Once submitted, a sequence was admitted: it may have to wait until its lost worker is replaced, which may
        # be the only one that is large enough.
        if sequence.generation > 1:
            sequence.excluded = ()
            return self._again_or_fail(sequence, failure, now_us)
        return self._life.fail(sequence, failure, now_us)

    def _again_or_fail(self, sequence: Sequence, failure: FailSequence, now_us: int) -> list[Command]:
        if sequence.unanswered_since_us is None:
            sequence.unanswered_since_us = now_us
        pause_us = min(self._limits.backoff_first_us << min(sequence.pauses, 20), self._limits.backoff_most_us)
        if now_us + pause_us - sequence.unanswered_since_us > self._limits.place_deadline_us:
            return self._life.fail(sequence, failure, now_us)
        sequence.pauses += 1
        self._life.pause(sequence, Cause.PLACE_FAILED, now_us + pause_us)
        return []

    def _refused(self, sequence: Sequence, reply: SubmitRefused, now_us: int) -> list[Command]:
        kind = REFUSED_AS.get(reply.reason)
        if kind is not None:
            return self._life.fail(sequence, FailSequence(sequence.name, kind, reply.message), now_us)
        why = f"worker {sequence.owner} refused it: {reply.reason.replace('_', ' ')}"
        return self._life.place_elsewhere(sequence, Cause.REFUSED_HERE, why, now_us)
