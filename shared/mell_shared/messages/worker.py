"""Commands that a worker receives, and its replies. Idempotent: a repeat gets the first reply."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from mell_shared.messages.base import (
    PROTOCOL_VERSION,
    Generation,
    Id,
    Label,
    Message,
    MigrationMode,
    Uint32,
    Uint32Column,
)
from mell_shared.messages.frontend import TokenLogprobs
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
    traceparent: Label = ""
    """The trace that it belongs to (W3C), if it is traced."""


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
    planned_tokens: int = Field(default=0, ge=0)
    """The room that the plan counts on at the target, growth on the way included; 0: not told."""
    reason: MigrationReason
    term: int = Field(ge=0)
    traceparent: Label = ""
    """The trace that it belongs to (W3C), if it is traced."""


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


class ReserveKv(Message):
    """A migration's source asks the target for room: blocks for the ids so far and `growth_tokens` more.

    Everything of the sequence but its KV. The target finds in its own prefix cache what it can and says how much.
    With `tokens` it begins at once to prefill all ids, with `hybrid` the first `split_tokens`. Answered with
    `KvReserved` or `KvRefused` at once, never queued.
    """

    kind: Literal["reserve_kv"] = "reserve_kv"
    migration: Id
    sequence: Id
    generation: Generation
    source: Id
    frontend: Id
    model: Id
    kv_layout: str
    block_tokens: int = Field(ge=1)
    prompt_ids: Uint32Column
    output_ids: Uint32Column = []
    sampling: SamplingParams
    priority: int = 0
    age_us: int = Field(default=0, ge=0)
    """Since it was first taken by a worker: whoever runs for longer gives way later."""
    max_outputs: int = Field(ge=1)
    """Where the output ends at the latest, as the worker that it began on has it."""
    cached_tokens: int = Field(default=0, ge=0)
    """Of the prompt, as told to the frontend by the worker that it began on."""
    mode: MigrationMode
    split_tokens: int = Field(default=0, ge=0)
    growth_tokens: int = Field(default=0, ge=0)
    kv_source: Label = ""
    """With `kv`: where the target's engine can fetch KV itself, if these engines do; no block is sent then."""
    protocol: int = PROTOCOL_VERSION
    traceparent: Label = ""
    """The trace that it belongs to (W3C), if it is traced."""


class ExtendKv(Message):
    """The source tells new output ids, from output index `first_index` on, and up to where the target shall prefill.

    `prefill_tokens` counts prompt and output; lower than what is computed it means: prefill no further. Answered with
    `CaughtUp` when that is reached, or a little later with how far it is; with `KvRefused` if nothing is held.
    """

    kind: Literal["extend_kv"] = "extend_kv"
    migration: Id
    number: int = Field(ge=0)
    """Counts the source's questions, so that an answer belongs to one of them."""
    first_index: Uint32
    output_ids: Uint32Column = []
    prefill_tokens: int = Field(ge=0)


class CommitMigration(Message):
    """The sequence stands still at the source: take it over. Answered when the frontend has decided.

    `output_ids` from output index `first_index` on complete the ids; KV of the slots named was sent and confirmed.
    What KV is missing the target computes. The other fields say what the source's part took, for the report.
    """

    kind: Literal["commit_migration"] = "commit_migration"
    migration: Id
    first_index: Uint32
    output_ids: Uint32Column = []
    computed_tokens: int = Field(ge=0)
    """KV that the source holds, in tokens; whatever was sent is valid up to there."""
    sent_slots: Uint32Column = []
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the last outputs, which the frontend may not have accepted; the last is the last output's."""
    copied_bytes: int = Field(default=0, ge=0)
    copy_us: int = Field(default=0, ge=0)
    mode: MigrationMode
    """As it was carried out in the end."""
    tail_us: int = Field(default=0, ge=0)
    """From the source's last token to this message."""


class ReleaseKv(Message):
    """The migration is off: free what is held for it. Without effect on a claim under way; safe to repeat."""

    kind: Literal["release_kv"] = "release_kv"
    migration: Id


PeerCommand = ReserveKv | ExtendKv | CommitMigration | ReleaseKv
"""What one worker asks another during a migration."""

WorkerCommand = Annotated[
    Submit | Cancel | Resend | Report | Migrate | Drain | Undrain | ReserveKv | ExtendKv | CommitMigration | ReleaseKv,
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


class KvReserved(Message):
    """Room is held, and an offer waits at `address` for whoever names `secret` and `size_bytes`.

    Slot i of the offer is block `held_tokens / block_tokens` + i of the sequence. `step_tokens`: what the target can
    prefill in one step, the most that may be left for it to compute when the sequence stops.
    """

    kind: Literal["kv_reserved"] = "kv_reserved"
    held_tokens: int = Field(ge=0)
    """Found in its prefix cache, whole blocks: neither to be sent nor to be computed."""
    slots: int = Field(ge=0)
    address: str
    secret: bytes
    size_bytes: int = Field(ge=0, lt=2**63)
    step_tokens: int = Field(ge=0)


class KvRefused(Message):
    """Nothing is held for this migration. `reason` is one of `MigrationFailed`'s."""

    kind: Literal["kv_refused"] = "kv_refused"
    reason: Id
    message: str


class CaughtUp(Message):
    """The target holds KV of the first `computed_tokens` tokens that it found or computed itself."""

    kind: Literal["caught_up"] = "caught_up"
    computed_tokens: int = Field(ge=0)


class CommitGranted(Message):
    """The sequence goes on at the target under the new generation: free it."""

    kind: Literal["commit_granted"] = "commit_granted"
    generation: Generation


class CommitRefused(Message):
    """The target does not go on with the sequence and holds nothing for it. `reason` is one of `MigrationFailed`'s."""

    kind: Literal["commit_refused"] = "commit_refused"
    reason: Id
    message: str


class KvReleased(Message):
    """Nothing is held for the migration, unless the frontend is being asked about it right now."""

    kind: Literal["kv_released"] = "kv_released"


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
    | KvReserved
    | KvRefused
    | CaughtUp
    | CommitGranted
    | CommitRefused
    | KvReleased
    | CommandInvalid,
    Field(discriminator="kind"),
]

WORKER_COMMAND: TypeAdapter[WorkerCommand] = TypeAdapter(WorkerCommand)
WORKER_REPLY: TypeAdapter[WorkerReply] = TypeAdapter(WorkerReply)
