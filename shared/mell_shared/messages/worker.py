"""Commands that a worker receives, and its replies. Idempotent: a repeat gets the first reply."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from mell_shared.messages.base import (
    PROTOCOL_VERSION,
    Generation,
    Id,
    Message,
    MigrationMode,
    Uint32,
    Uint32Column,
)
from mell_shared.messages.sampling import SamplingParams


class Submit(Message):
    """Run a sequence from `prompt_ids` + `output_ids` (the latter are delivered already; go on after them)."""

    kind: Literal["submit"] = "submit"
    sequence: Id
    generation: Generation
    frontend: Id
    model: Id
    prompt_ids: Uint32Column
    output_ids: Uint32Column = []
    sampling: SamplingParams
    priority: int = 0
    protocol: int = PROTOCOL_VERSION


class Cancel(Message):
    """Stop a sequence and free what it holds; without effect if it is unknown or of another generation."""

    kind: Literal["cancel"] = "cancel"
    sequence: Id
    generation: Generation


class Resend(Message):
    """Publish a sequence's tokens again from output index `first_index`; sent to the worker on a gap."""

    kind: Literal["resend"] = "resend"
    sequence: Id
    generation: Generation
    first_index: Uint32


class Report(Message):
    """Announce yourself and your state now; sent by a new leader to all workers, without a reply."""

    kind: Literal["report"] = "report"


MigrationReason = Literal["overload", "drain", "attached", "consolidate", "manual"]


class Migrate(Message):
    """Move a sequence of this generation to `target` while it decodes; idempotent by `migration`.

    With `hybrid` the target prefills the first `split_tokens` tokens, a whole number of blocks; the rest is copied.
    `term` is the sender's: a worker that knows a higher one refuses.
    """

    kind: Literal["migrate"] = "migrate"
    migration: Id
    sequence: Id
    generation: Generation
    target: Id
    mode: MigrationMode
    split_tokens: int = Field(default=0, ge=0)
    reason: MigrationReason
    term: int = Field(ge=0)


class Drain(Message):
    """Take nothing new, and be emptied; after `deadline_s` from now give back what is left (None: never).

    A repeat sets the deadline anew. `term` is the sender's: a worker that knows a higher one refuses.
    """

    kind: Literal["drain"] = "drain"
    term: int = Field(ge=0)
    deadline_s: float | None = Field(default=None, ge=0)


class Undrain(Message):
    """The end of `Drain`: take work again."""

    kind: Literal["undrain"] = "undrain"
    term: int = Field(ge=0)


WorkerCommand = Annotated[
    Submit | Cancel | Resend | Report | Migrate | Drain | Undrain,
    Field(discriminator="kind"),
]


class SubmitAccepted(Message):
    """The sequence is in the running set; `cached_tokens` of its prompt need no prefill."""

    kind: Literal["submit_accepted"] = "submit_accepted"
    cached_tokens: int = Field(default=0, ge=0)


SubmitRefusal = Literal["no_room", "too_large", "wrong_model", "bad_request", "protocol", "stopping", "superseded"]


class SubmitRefused(Message):
    """The sequence does not run here. `no_room`, `stopping`: another worker may; else nobody should retry.

    `superseded`: a newer generation, or a cancellation of this one, was here before; only late commands get it.
    """

    kind: Literal["submit_refused"] = "submit_refused"
    reason: SubmitRefusal
    message: str


class CancelDone(Message):
    """The sequence holds nothing here (any more)."""

    kind: Literal["cancel_done"] = "cancel_done"


class ResendDone(Message):
    """The tokens asked for follow on the frontend's token subject (`known`), or the sequence is not here."""

    kind: Literal["resend_done"] = "resend_done"
    known: bool


class MigrateAccepted(Message):
    """The move has begun; `MigrationCommitted` or `MigrationFailed` follows on the schedulers' subject."""

    kind: Literal["migrate_accepted"] = "migrate_accepted"


class MigrateRefused(Message):
    """The sequence stays as it is. `reason` is one of `MigrationFailed`'s; `term` the highest known here."""

    kind: Literal["migrate_refused"] = "migrate_refused"
    reason: Id
    message: str
    term: int = Field(default=0, ge=0)


class DrainSet(Message):
    """Whether the worker drains from now on, as it will report; it still holds `sequences`."""

    kind: Literal["drain_set"] = "drain_set"
    draining: bool
    sequences: int = Field(ge=0)


class DrainRefused(Message):
    """Nothing has changed: the sender's `term` is over (`term` here is the highest known), or the worker stops."""

    kind: Literal["drain_refused"] = "drain_refused"
    reason: Literal["term", "stopping"]
    message: str
    term: int = Field(default=0, ge=0)


class CommandInvalid(Message):
    """The command could not be read; it was dropped."""

    kind: Literal["command_invalid"] = "command_invalid"
    message: str


WorkerReply = Annotated[
    SubmitAccepted
    | SubmitRefused
    | CancelDone
    | ResendDone
    | MigrateAccepted
    | MigrateRefused
    | DrainSet
    | DrainRefused
    | CommandInvalid,
    Field(discriminator="kind"),
]

WORKER_COMMAND: TypeAdapter[WorkerCommand] = TypeAdapter(WorkerCommand)
WORKER_REPLY: TypeAdapter[WorkerReply] = TypeAdapter(WorkerReply)
