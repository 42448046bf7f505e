"""Messages that a frontend receives from workers, and its replies: tokens, and the arbitration of streams."""

from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from mell_shared.messages.base import Generation, Id, Message, Uint32, Uint32Column, require_equal_lengths
from mell_shared.messages.sampling import FinishReason


class TokenLogprobs(Message):
    """Natural-log probabilities at one output index: the chosen token's, then the most likely ones in order."""

    logprob: float
    top_ids: Uint32Column = []
    top_logprobs: tuple[float, ...] = ()


class TokensGenerated(Message):
    """What one engine step made for one frontend; one row per sequence, columns packed.

    Row i of `sequences` made `counts[i]` tokens from output index `first_indices[i]` on; their ids follow each
    other in `token_ids`. A row may have no tokens and a finish reason. `logprobs` and `finished` are keyed by row.
    """

    kind: Literal["tokens"] = "tokens"
    worker: Id
    sequences: tuple[Id, ...]
    generations: Uint32Column
    first_indices: Uint32Column
    counts: Uint32Column
    token_ids: Uint32Column
    logprobs: dict[Uint32, tuple[TokenLogprobs, ...]] = {}
    finished: dict[Uint32, FinishReason] = {}
    cached_tokens: dict[Uint32, int] = {}
    """Prompt tokens that needed no prefill, said once, with a sequence's first row."""

    @model_validator(mode="after")
    def _rows_match(self) -> Self:
        require_equal_lengths(
            sequences=self.sequences,
            generations=self.generations,
            first_indices=self.first_indices,
            counts=self.counts,
        )
        if sum(self.counts) != len(self.token_ids):
            raise ValueError("counts do not add up to the token ids")
        return self


class StreamStatus(Message):
    """All of a worker's sequences that belong to this frontend, sent every second and after a reconnection.

    `next_indices`: the output index each will produce next. `ended`: 1 where it has ended and waits for `AckEnd`.
    """

    kind: Literal["stream_status"] = "stream_status"
    worker: Id
    sequences: tuple[Id, ...] = ()
    generations: Uint32Column = []
    next_indices: Uint32Column = []
    ended: Uint32Column = []

    @model_validator(mode="after")
    def _rows_match(self) -> Self:
        require_equal_lengths(
            sequences=self.sequences,
            generations=self.generations,
            next_indices=self.next_indices,
            ended=self.ended,
        )
        return self


class Claim(Message):
    """A migration's target asks to own a sequence whose KV it holds up to `length` tokens of output."""

    kind: Literal["claim"] = "claim"
    sequence: Id
    generation: Generation
    migration: Id
    source: Id
    target: Id
    length: Uint32


class AbortMigration(Message):
    """A migration's source asks that a claim not yet granted never be."""

    kind: Literal["abort_migration"] = "abort_migration"
    sequence: Id
    generation: Generation
    migration: Id
    source: Id


class Evicted(Message):
    """A worker gave a sequence up (drain deadline, preemption for good); `output_ids` are all it generated."""

    kind: Literal["evicted"] = "evicted"
    worker: Id
    sequence: Id
    generation: Generation
    output_ids: Uint32Column = []


FrontendControl = Annotated[StreamStatus | Claim | AbortMigration | Evicted, Field(discriminator="kind")]


class StreamStatusReply(Message):
    """What the worker should do, by row of the status: resend from an index, cancel, forget an acknowledged end."""

    kind: Literal["stream_status_reply"] = "stream_status_reply"
    resend: dict[Uint32, Uint32] = {}
    cancel: Uint32Column = []
    ack_end: Uint32Column = []


class Granted(Message):
    """The target owns the sequence, under a new generation; it publishes from output index `accepted`."""

    kind: Literal["granted"] = "granted"
    generation: Generation
    accepted: Uint32


ClaimRefusal = Literal["unknown", "ended", "generation", "owner", "aborted", "length"]


class Refused(Message):
    """The claim, or the eviction, does not hold; free what was made for it."""

    kind: Literal["refused"] = "refused"
    reason: ClaimRefusal


class MigrationAborted(Message):
    """The claim will never be granted; `owned` says whether the source still owns the sequence."""

    kind: Literal["migration_aborted"] = "migration_aborted"
    owned: bool


class EvictionTaken(Message):
    """The frontend goes on with the sequence elsewhere; free it."""

    kind: Literal["eviction_taken"] = "eviction_taken"


class ControlInvalid(Message):
    """The message could not be read; it was dropped."""

    kind: Literal["control_invalid"] = "control_invalid"
    message: str


FrontendReply = Annotated[
    StreamStatusReply | Granted | Refused | MigrationAborted | EvictionTaken | ControlInvalid,
    Field(discriminator="kind"),
]

TOKENS_GENERATED: TypeAdapter[TokensGenerated] = TypeAdapter(TokensGenerated)
FRONTEND_CONTROL: TypeAdapter[FrontendControl] = TypeAdapter(FrontendControl)
FRONTEND_REPLY: TypeAdapter[FrontendReply] = TypeAdapter(FrontendReply)
