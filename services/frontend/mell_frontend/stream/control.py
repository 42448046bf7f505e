"""What workers ask of the arbiter: the state of their streams, to take a sequence over, to give one up."""

from mell_frontend.stream.book import Book
from mell_frontend.stream.claims import claim_refusal, eviction_refusal, repeated_grant, still_owns
from mell_frontend.stream.commands import Command, DeliverTokens, ReplyControl
from mell_frontend.stream.life import Life
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream.sequence import Sequence
from mell_frontend.stream.states import Cause
from mell_frontend.stream.stats import StreamStats
from mell_frontend.stream.tokens import TokenIntake
from mell_shared.messages.frontend import (
    AbortMigration,
    Claim,
    ClaimRefusal,
    Evicted,
    EvictionTaken,
    FrontendReply,
    Granted,
    MigrationAborted,
    Refused,
)


class Arbiter:
    """Answers `Claim`, `AbortMigration` and `Evicted`."""

    def __init__(self, limits: StreamLimits, book: Book, life: Life, intake: TokenIntake, stats: StreamStats) -> None:
        self._limits = limits
        self._book = book
        self._life = life
        self._intake = intake
        self._stats = stats

    def claim(self, reply_to: str, claim: Claim, now_us: int) -> list[Command]:
        """Grant the claim if the rules allow it; the target owns the sequence from then on."""
        self._book.hear(claim.target, now_us)
        sequence = self._book.open.get(claim.sequence)
        if sequence is None:
            self._stats.claims_refused += 1
            return [ReplyControl(reply_to, Refused(reason=self._gone(claim.sequence)))]
        grant = repeated_grant(sequence, claim)
        if grant is not None:
            return [ReplyControl(reply_to, grant)]
        refusal = claim_refusal(sequence, claim, self._limits.max_aborted)
        if refusal is not None:
            self._stats.claims_refused += 1
            return [ReplyControl(reply_to, Refused(reason=refusal))]
        return [ReplyControl(reply_to, self._grant(sequence, claim, now_us))]

    def abort(self, reply_to: str, abort: AbortMigration, now_us: int) -> list[Command]:
        """Make sure that the migration's claim is never granted, unless it was; say who owns the sequence."""
        self._book.hear(abort.source, now_us)
        sequence = self._book.open.get(abort.sequence)
        owned = sequence is not None and still_owns(sequence, abort)
        if sequence is not None and owned and len(sequence.aborted) < self._limits.max_aborted:
            sequence.aborted.add(abort.migration)
        return [ReplyControl(reply_to, MigrationAborted(owned=owned))]

    def evict(self, reply_to: str, eviction: Evicted, now_us: int) -> list[Command]:
        """Take what the worker made before it gave the sequence up, and place the sequence elsewhere."""
        self._book.hear(eviction.worker, now_us)
        sequence = self._book.open.get(eviction.sequence)
        if sequence is None:
            return [ReplyControl(reply_to, Refused(reason=self._gone(eviction.sequence)))]
        if sequence.evicted == (eviction.worker, eviction.generation):
            return [ReplyControl(reply_to, EvictionTaken())]
        refusal = eviction_refusal(sequence, eviction)
        if refusal is not None:
            return [ReplyControl(reply_to, Refused(reason=refusal))]
        reply: FrontendReply = EvictionTaken()
        return [ReplyControl(reply_to, reply), *self._take_evicted(sequence, eviction, now_us)]

    def _grant(self, sequence: Sequence, claim: Claim, now_us: int) -> Granted:
        self._book.take(sequence)
        sequence.move(Cause.CLAIM_GRANTED)
        self._book.give(sequence, claim.target, now_us)
        self._life.note_streaming(sequence)
        granted = Granted(generation=sequence.generation, accepted=sequence.accepted)
        sequence.granted = (claim, granted)
        self._stats.claims_granted += 1
        return granted

    def _take_evicted(self, sequence: Sequence, eviction: Evicted, now_us: int) -> list[Command]:
        self._stats.evictions += 1
        sequence.evicted = (eviction.worker, eviction.generation)
        commands: list[Command] = []
        # Without their log-probabilities the tokens are of no use to a reader who asked for those: made again.
        if sequence.request.sampling.logprobs is None:
            fresh = eviction.output_ids[sequence.accepted :]
            taken = self._intake.accept_up_to_limit(sequence, fresh, now_us)
            if taken:
                commands.append(DeliverTokens(sequence.name, taken, (), None, sequence.cached_tokens))
        why = f"worker {eviction.worker} gave it up"
        return [*commands, *self._life.place_elsewhere(sequence, Cause.EVICTED, why, now_us)]

    def _gone(self, name: str) -> ClaimRefusal:
        return "ended" if name in self._book.ended else "unknown"
