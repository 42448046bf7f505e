"""Which tokens are accepted: from the owner, in its generation, each index once and in order."""

from dataclasses import dataclass

from mell_frontend.stream.book import Book
from mell_frontend.stream.commands import AskResend, Command, DeliverTokens, FailSequence
from mell_frontend.stream.life import Life
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream.sequence import Sequence
from mell_frontend.stream.states import Cause, State
from mell_frontend.stream.stats import StreamStats
from mell_shared.messages.frontend import TokenLogprobs, TokensGenerated
from mell_shared.messages.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a `TokensGenerated`."""

    first_index: int
    token_ids: list[int]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    cached_tokens: int | None


class TokenIntake:
    """Judges every row of `TokensGenerated`. The common row (the next tokens, nothing special) has a fast path."""

    def __init__(self, limits: StreamLimits, book: Book, life: Life, stats: StreamStats) -> None:
        self._limits = limits
        self._book = book
        self._life = life
        self._stats = stats

    def take(self, message: TokensGenerated, now_us: int) -> list[Command]:
        """Accept what is next in each of the message's sequences; drop the rest, ask for gaps."""
        owner = self._book.hear(message.worker, now_us)
        if owner is None:
            self._stats.rows_stale += len(message.sequences)
            return []
        commands: list[Command] = []
        special = message.finished.keys() | message.logprobs.keys() | message.cached_tokens.keys()
        end = 0
        rows = zip(message.sequences, message.generations, message.first_indices, message.counts, strict=True)
        for number, (name, generation, first_index, count) in enumerate(rows):
            begin, end = end, end + count
            sequence = owner.sequences.get(name)
            if sequence is None or sequence.generation != generation:
                self._stats.rows_stale += 1
                continue
            token_ids = message.token_ids[begin:end]
            if number not in special and self._is_plain(sequence, first_index, count):
                self._accept(sequence, token_ids, now_us)
                commands.append(DeliverTokens(name, token_ids, (), None, sequence.cached_tokens))
            else:
                commands += self._take_row(sequence, _row(message, number, first_index, token_ids), now_us)
        return commands

    def ask_resend(self, sequence: Sequence, now_us: int) -> list[Command]:
        """Ask the owner for all tokens from the next index on, unless that was done a moment ago."""
        assert sequence.owner is not None
        asked_us = sequence.resend_asked_us
        if asked_us is not None and now_us - asked_us < self._limits.resend_pause_us:
            return []
        sequence.resend_asked_us = now_us
        self._stats.resends += 1
        return [AskResend(sequence.owner, sequence.resend())]

    def accept_up_to_limit(self, sequence: Sequence, token_ids: list[int], now_us: int) -> list[int]:
        """Accept the next tokens as far as the sequence's limit allows; returns those."""
        taken = token_ids[: sequence.output_limit - sequence.accepted]
        if taken:
            self._accept(sequence, taken, now_us)
        return taken

    def _is_plain(self, sequence: Sequence, first_index: int, count: int) -> bool:
        return (
            first_index == len(sequence.output_ids)
            and 0 < count <= sequence.output_limit - first_index
            and sequence.state is State.STREAMING
            and sequence.request.sampling.logprobs is None
        )

    def _accept(self, sequence: Sequence, token_ids: list[int], now_us: int) -> None:
        sequence.output_ids += token_ids
        sequence.progressed_us = now_us
        sequence.resend_asked_us = None
        sequence.resends = 0
        sequence.setbacks = 0
        self._stats.tokens_accepted += len(token_ids)

    def _take_row(self, sequence: Sequence, row: Row, now_us: int) -> list[Command]:
        self._life.owner_has_it(sequence)
        if row.cached_tokens is not None and sequence.accepted == 0:
            sequence.cached_tokens = row.cached_tokens
        if row.first_index > sequence.accepted:
            self._stats.gaps += 1
            return self._mend_gap(sequence, now_us)
        repeated = sequence.accepted - row.first_index
        self._stats.tokens_repeated += min(repeated, len(row.token_ids))
        if repeated > len(row.token_ids):
            return []  # even its finish is older than what was accepted
        wanted = sequence.request.sampling.logprobs is not None
        if wanted and len(row.logprobs) != len(row.token_ids):
            failure = FailSequence(sequence.name, "failed", "the worker sent tokens without their log-probabilities")
            return self._life.stop_and_fail(sequence, failure, now_us)
        fresh = row.token_ids[repeated:]
        taken = self.accept_up_to_limit(sequence, fresh, now_us)
        logprobs = row.logprobs[repeated : repeated + len(taken)] if wanted else ()
        beyond_limit = len(fresh) > len(taken)
        reason: FinishReason | None = "length" if beyond_limit else row.finish_reason
        delta = DeliverTokens(sequence.name, taken, logprobs, reason, sequence.cached_tokens)
        if beyond_limit:
            return self._life.finish_at_limit(sequence, delta, now_us)
        return self._end_row(sequence, delta, now_us)

    def _mend_gap(self, sequence: Sequence, now_us: int) -> list[Command]:
        commands = self.ask_resend(sequence, now_us)
        sequence.resends += len(commands)
        if sequence.resends <= self._limits.max_resends:
            return commands
        why = f"what worker {sequence.owner} sends does not arrive"
        return self._life.lose(sequence, Cause.OWNER_LOST, why, now_us)

    def _end_row(self, sequence: Sequence, delta: DeliverTokens, now_us: int) -> list[Command]:
        if delta.finish_reason in {"stop", "length"}:
            return self._life.finish(sequence, delta, now_us)
        tokens = DeliverTokens(delta.sequence, delta.token_ids, delta.logprobs, None, delta.cached_tokens)
        commands: list[Command] = [tokens] if delta.token_ids else []
        if delta.finish_reason == "error":
            failure = FailSequence(sequence.name, "failed", "the engine could not go on with this request")
            commands += self._life.fail(sequence, failure, now_us)
        elif delta.finish_reason == "cancelled":  # we did not ask for that: the worker gave it up
            why = f"worker {sequence.owner} cancelled it"
            commands += self._life.place_elsewhere(sequence, Cause.OWNER_LOST, why, now_us)
        return commands


def _row(message: TokensGenerated, number: int, first_index: int, token_ids: list[int]) -> Row:
    return Row(
        first_index=first_index,
        token_ids=token_ids,
        logprobs=message.logprobs.get(number, ()),
        finish_reason=message.finished.get(number),
        cached_tokens=message.cached_tokens.get(number),
    )
