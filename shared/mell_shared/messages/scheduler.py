"""Messages that a scheduler receives, and its replies."""

from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from mell_shared.messages.base import (
    PROTOCOL_VERSION,
    Generation,
    Id,
    Label,
    Message,
    MigrationMode,
    Uint32Column,
    require_equal_lengths,
)
from mell_shared.messages.sampling import FinishReason


class PlaceRequest(Message):
    """A frontend asks where a sequence should run; idempotent by (sequence, generation), never the prompt itself.

    `max_output_tokens` None means as many as fit. A higher `priority` is placed sooner, whoever waited longer.
    `waited_s` rebuilds the queue's order after a failover.
    `excluded` names workers that refused or lost this sequence just now.
    """

    kind: Literal["place"] = "place"
    sequence: Id
    generation: Generation
    frontend: Id
    model: Id
    prompt_tokens: int = Field(ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    priority: int = 0
    waited_s: float = Field(default=0.0, ge=0)
    excluded: tuple[Id, ...] = ()
    request_id: Label = ""
    """What the client and the frontend's log call the request (`x-request-id`)."""
    traceparent: Label = ""
    """The trace that it belongs to (W3C), if it is traced."""


class Placed(Message):
    """Submit to `worker` now; its own allocator has the last word."""

    kind: Literal["placed"] = "placed"
    worker: Id


class Queued(Message):
    """No room yet; ask again at once (the scheduler holds the reply for up to `queue_hold_s`)."""

    kind: Literal["queued"] = "queued"
    position: int = Field(ge=0)


RejectReason = Literal["queue_full", "no_worker", "too_large", "unknown_model"]


class Rejected(Message):
    """The sequence cannot be placed. `limit_tokens` says what could be (for `too_large`)."""

    kind: Literal["rejected"] = "rejected"
    reason: RejectReason
    message: str
    retry_after_s: float | None = None
    limit_tokens: int | None = None


PlaceReply = Annotated[Placed | Queued | Rejected, Field(discriminator="kind")]


class WorkerSpec(Message):
    """What a worker is and holds; constant for one incarnation."""

    worker: Id
    name: str
    host: str
    model: Id
    engine: str
    device: str
    protocol: int = PROTOCOL_VERSION
    kv_layout: str
    """Digest of all that makes two KV pools interchangeable: model, revision, dtype, block size, layers."""
    max_model_len: int = Field(ge=1)
    kv_blocks: int = Field(ge=1)
    block_tokens: int = Field(ge=1)
    max_sequences: int = Field(ge=1)
    migration_modes: tuple[Id, ...] = ()
    """The `MigrationMode`s it can take part in, at either end; none: its sequences stay. Unknown ones are ignored."""
    max_outgoing_moves: int = Field(default=0, ge=0)
    max_incoming_moves: int = Field(default=0, ge=0)
    """Most sequences it moves away, and takes in, at once; what is ordered beyond that is refused. Here and below 0
    means unknown."""
    kv_bytes_per_token: int = Field(default=0, ge=0)
    link_bytes_per_s: int = Field(default=0, ge=0)
    """What its link carries each way."""
    prefill_tokens_per_s: int = Field(default=0, ge=0)
    """What it can prefill for others without hurting its decodes: beside one, or a few."""
    profiled_batches: Uint32Column = []
    """Numbers of decodes, ascending, beside which that was measured."""
    profiled_tokens_per_s: Uint32Column = []
    """What it was beside as many."""

    @model_validator(mode="after")
    def _rows_match(self) -> Self:
        require_equal_lengths(profiled_batches=self.profiled_batches, profiled_tokens_per_s=self.profiled_tokens_per_s)
        return self

    @property
    def max_total_tokens(self) -> int:
        """The longest sequence this worker can ever hold, in tokens."""
        return min(self.max_model_len, self.kv_blocks * self.block_tokens)


class WorkerJoined(Message):
    """A worker is ready for work; repeated on `Report`."""

    kind: Literal["worker_joined"] = "worker_joined"
    spec: WorkerSpec


class WorkerReport(Message):
    """A worker's full state in packed columns, one row per sequence; `number` rises by one each report.

    `blocks` counts a sequence's KV blocks (shared ones counted with every holder), `used_blocks` unique ones.
    `states`: 0 running, 1 waiting (preempted). `step_us` is the recent mean time of a decode step.
    """

    kind: Literal["worker_report"] = "worker_report"
    worker: Id
    number: int = Field(ge=0)
    free_blocks: int = Field(ge=0)
    used_blocks: int = Field(ge=0)
    draining: bool = False
    step_us: int = Field(default=0, ge=0)
    preemptions: int = Field(default=0, ge=0)
    reserved_blocks: int = Field(default=0, ge=0)
    """Of the used ones, those held for sequences on their way here; these have no rows."""
    sequences: tuple[Id, ...] = ()
    generations: Uint32Column = []
    tokens: Uint32Column = []
    """Prompt and output together."""
    blocks: Uint32Column = []
    states: Uint32Column = []

    @model_validator(mode="after")
    def _rows_match(self) -> Self:
        require_equal_lengths(
            sequences=self.sequences,
            generations=self.generations,
            tokens=self.tokens,
            blocks=self.blocks,
            states=self.states,
        )
        return self


class WorkerLeft(Message):
    """A worker goes; nothing may be placed there any more."""

    kind: Literal["worker_left"] = "worker_left"
    worker: Id
    reason: str


class SequenceFinished(Message):
    """A sequence has ended at a worker and holds nothing there."""

    kind: Literal["sequence_finished"] = "sequence_finished"
    worker: Id
    sequence: Id
    generation: Generation
    reason: FinishReason


class MigrationCommitted(Message):
    """A sequence goes on at `worker`, its new owner, under the new generation. What it took is 0 where unknown."""

    kind: Literal["migration_committed"] = "migration_committed"
    worker: Id
    source: Id
    migration: Id
    sequence: Id
    generation: Generation
    copied_bytes: int = Field(default=0, ge=0)
    copy_us: int = Field(default=0, ge=0)
    prefilled_tokens: int = Field(default=0, ge=0)
    prefill_us: int = Field(default=0, ge=0)
    stopped_us: int = Field(default=0, ge=0)
    """From the source's last token to the target's first; the next three are its shares."""
    tail_us: int = Field(default=0, ge=0)
    """Until the source had sent the rest and asked for the commit."""
    claim_us: int = Field(default=0, ge=0)
    """From there to the frontend's grant at the target."""
    first_step_us: int = Field(default=0, ge=0)
    """From there to the target's first token; 0 if that was computed before the grant."""
    mode: MigrationMode | None = None
    """As it was carried out in the end; None: not told."""


class MigrationFailed(Message):
    """A sequence stays at `worker`, the source, or has ended there; nothing is held for it at the target.

    Reasons that say something about the two workers: `unsupported`, `unreachable`, `link`, `corrupt`, `timeout`.
    About this sequence only: `no_room`, `busy`, `unknown`, `superseded`, `ended`, `preempted`, `stopping`, `term`,
    `bound` (the target's engine cannot go on with one like it).
    """

    kind: Literal["migration_failed"] = "migration_failed"
    worker: Id
    migration: Id
    sequence: Id
    generation: Generation
    reason: Id
    message: str = ""
    mode: MigrationMode | None = None


class LaneMeasured(Message):
    """What the lane from `worker` to `target` carries, measured when they got to know each other."""

    kind: Literal["lane_measured"] = "lane_measured"
    worker: Id
    target: Id
    bytes_per_s: int = Field(ge=1)
    latency_us: int = Field(ge=0)


SchedulerEvent = Annotated[
    WorkerJoined | WorkerReport | WorkerLeft | SequenceFinished | MigrationCommitted | MigrationFailed | LaneMeasured,
    Field(discriminator="kind"),
]

PLACE_REQUEST: TypeAdapter[PlaceRequest] = TypeAdapter(PlaceRequest)
PLACE_REPLY: TypeAdapter[PlaceReply] = TypeAdapter(PlaceReply)
SCHEDULER_EVENT: TypeAdapter[SchedulerEvent] = TypeAdapter(SchedulerEvent)
