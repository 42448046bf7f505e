"""Time and signs of life: silent owners, our own connection, cancels and resends that went unanswered."""

from mell_frontend.stream.book import Book, Owner
from mell_frontend.stream.commands import Command, FailSequence
from mell_frontend.stream.events import CancelAnswered, CancelFailed, ResendAnswered, ResendFailed
from mell_frontend.stream.life import Life
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream.sequence import Sequence
from mell_frontend.stream.states import Cause, State
from mell_frontend.stream.tokens import TokenIntake


class Liveness:
    """Decides when an owner is lost. Silence counts only while our own connection is up and we run ourselves."""

    def __init__(self, limits: StreamLimits, book: Book, life: Life, intake: TokenIntake) -> None:
        self._limits = limits
        self._book = book
        self._life = life
        self._intake = intake
        self._disconnected_us: int | None = None

    def connection_lost(self, now_us: int) -> list[Command]:
        """Stop to count silence."""
        if self._disconnected_us is None:
            self._disconnected_us = now_us
        return []

    def connection_restored(self, now_us: int) -> list[Command]:
        """Begin to count silence anew."""
        self._disconnected_us = None
        return self.stood_still(now_us)

    def stood_still(self, now_us: int) -> list[Command]:
        """Nobody could be heard: begin to count silence anew."""
        for worker in self._book.owners:
            self._book.hear(worker, now_us)
        return []

    def ticked(self, now_us: int) -> list[Command]:
        """Do what has become due."""
        commands = self._life.resume(now_us)
        if self._disconnected_us is None:
            commands += self._watch_owners(now_us)
            commands += self._life.retry_cancels(now_us)
        elif now_us - self._disconnected_us >= self._limits.broker_lost_us:
            commands += self._fail_all(now_us)
        self._book.forget_ended(now_us - self._limits.ended_memory_us)
        return commands

    def resend_answered(self, event: ResendAnswered, now_us: int) -> list[Command]:
        """A worker that does not know what it owns has lost it."""
        sequence = self._streaming(event.sequence, event.generation)
        if sequence is None:
            return []
        assert sequence.owner is not None
        self._book.hear(sequence.owner, now_us)
        if event.known:
            return []
        why = f"worker {sequence.owner} does not know it"
        return self._life.place_elsewhere(sequence, Cause.OWNER_LOST, why, now_us)

    def resend_failed(self, event: ResendFailed, now_us: int) -> list[Command]:
        """Nobody listens on the worker's subject: it is gone, with all it had. Other failures prove nothing."""
        sequence = self._streaming(event.sequence, event.generation)
        if sequence is None or event.failure != "no_responder":
            return []
        assert sequence.owner is not None
        return self._lose_all(self._book.owners[sequence.owner], f"worker {sequence.owner} is gone", now_us)

    def cancel_answered(self, event: CancelAnswered) -> list[Command]:
        """The worker has stopped."""
        pending = self._book.cancels.get(event.sequence)
        if pending is not None and pending.message.generation == event.generation:
            del self._book.cancels[event.sequence]
        return []

    def cancel_failed(self, event: CancelFailed, now_us: int) -> list[Command]:
        """Try again later, unless the worker is gone."""
        pending = self._book.cancels.get(event.sequence)
        if pending is None or pending.message.generation != event.generation:
            return []
        if event.failure == "no_responder":
            del self._book.cancels[event.sequence]
        else:
            pending.retry_at_us = now_us + self._limits.cancel_retry_us
        return []

    def _streaming(self, name: str, generation: int) -> Sequence | None:
        sequence = self._book.open.get(name)
        if sequence is None or sequence.generation != generation or sequence.state is not State.STREAMING:
            return None
        return sequence

    def _watch_owners(self, now_us: int) -> list[Command]:
        commands: list[Command] = []
        for worker, owner in list(self._book.owners.items()):
            silence_us = now_us - owner.heard_us
            if silence_us >= self._limits.worker_silence_us:
                commands += self._lose_all(
                    owner, f"worker {worker} has been silent for {silence_us / 1e6:.1f} s", now_us
                )
            elif silence_us >= self._limits.worker_suspect_us and not owner.suspected:
                commands += self._ask_for_sign(owner, now_us)
        return commands

    def _ask_for_sign(self, owner: Owner, now_us: int) -> list[Command]:
        first = next((s for s in owner.sequences.values() if s.state is State.STREAMING), None)
        if first is None:
            return []
        commands = self._intake.ask_resend(first, now_us)
        owner.suspected = bool(commands)
        return commands

    def _lose_all(self, owner: Owner, why: str, now_us: int) -> list[Command]:
        commands: list[Command] = []
        for sequence in list(owner.sequences.values()):
            # A submission still under way has its own timeout.
            if sequence.state is State.STREAMING:
                commands += self._life.lose(sequence, Cause.OWNER_LOST, why, now_us)
        return commands

    def _fail_all(self, now_us: int) -> list[Command]:
        commands: list[Command] = []
        for sequence in list(self._book.open.values()):
            failure = FailSequence(sequence.name, "unavailable", "the connection to the broker was lost")
            if sequence.state is State.STREAMING:
                commands += self._life.stop_and_fail(sequence, failure, now_us)
        return commands
