"""What operators ask of the leading scheduler (through a frontend), and the answers.

Each is answered within about a second; what takes longer is asked again under the same `ask`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from mell_shared.messages.base import Generation, Id, Message, MigrationMode, Uint32Column, require_equal_lengths

ModeAsked = MigrationMode | Literal["auto"]
"""`auto`: as the scheduler would divide between link and prefill."""


class StatusRequest(Message):
    """Ask for the state of the cluster as the scheduler sees it; with `sequences` also for each one."""

    kind: Literal["status"] = "status"
    sequences: bool = False


class LiveRequest(Message):
    """Ask for what changes from second to second, in columns; a frontend asks once for all who watch."""

    kind: Literal["live"] = "live"


class DrainRequest(Message):
    """Empty a worker (an id, or a name that only one has) and keep it empty until it is undrained.

    After `deadline_s` (None: never) it gives back what is left, to be placed elsewhere. `dry_run` only shows the plan.
    """

    kind: Literal["drain"] = "drain"
    worker: Id
    deadline_s: float | None = Field(default=None, ge=0, le=1_000_000)
    dry_run: bool = False


class UndrainRequest(Message):
    """Let a worker take work again."""

    kind: Literal["undrain"] = "undrain"
    worker: Id


class MigrateRequest(Message):
    """Move the sequences of a request (its id, `x-request-id`, or one sequence's id) to a worker while they run.

    Idempotent by `ask`: a repeat tells how the first one's moves stand.
    """

    kind: Literal["migrate"] = "migrate"
    ask: Id
    request: Id
    target: Id
    mode: ModeAsked = "auto"


class MovingRequest(Message):
    """Plan no more moves, or go on planning; those of operators are made all the same."""

    kind: Literal["moving"] = "moving"
    paused: bool


class ExplainRequest(Message):
    """Ask what became of a request (as in `MigrateRequest`), and why."""

    kind: Literal["explain"] = "explain"
    request: Id


AdminRequest = Annotated[
    StatusRequest | LiveRequest | DrainRequest | UndrainRequest | MigrateRequest | MovingRequest | ExplainRequest,
    Field(discriminator="kind"),
]


class WorkerStatus(Message):
    """One worker in a status. `draining` takes nothing new; `drained` is so and empty; `standby` ready and empty."""

    worker: Id
    name: str
    host: str
    model: Id
    engine: str
    device: str
    state: Literal["active", "draining", "drained", "standby", "silent"]
    kv_blocks: int
    used_blocks: int
    block_tokens: int
    running: int
    waiting: int
    step_us: int
    report_age_s: float
    sequences: int = 0
    """What it holds or is about to, moves not counted."""
    leaving: int = 0
    coming: int = 0
    """By moves under way."""
    migration_modes: tuple[Id, ...] = ()
    kv_bytes_per_token: int = 0
    """0 where it is not known."""


class GpuUse(Message):
    """GPU-time since this scheduler has led, beside what another policy would have needed for the same requests.

    `up`: workers that are there; `used`: those that hold something; `shadow`: those that the policy compared with
    would use. That policy is fed what was placed, how it grew and when it ended, and has as many GPUs as it likes.
    """

    since_s: float
    up: int = 0
    used: int = 0
    up_gpu_s: float = 0.0
    used_gpu_s: float = 0.0
    shadow_policy: str = ""
    """Empty: nothing is compared."""
    shadow: int = 0
    shadow_gpu_s: float = 0.0
    shadow_preemptions: int = 0
    """Sequences that outgrew their GPU there, and were placed anew."""


class ModelStatus(Message):
    """One model in a status; `gpus_wanted` is how many workers should be up."""

    model: Id
    gpus_wanted: int


class MoveStatus(Message):
    """One move: under way, or how it came out. Times are seconds; 0 where nothing is known."""

    migration: Id
    sequence: Id
    source: Id
    target: Id
    mode: MigrationMode
    reason: Id
    """Why it was begun."""
    blocks: int = 0
    outcome: Literal["moving", "committed", "failed", "timeout", "ended"] = "moving"
    why: str = ""
    """Of an outcome that is not `committed`."""
    predicted_s: float = 0.0
    took_s: float = 0.0
    """So far, or in all: from the order to the news."""
    ago_s: float = 0.0
    """Since it came out."""
    stopped_s: float = 0.0
    """From the source's last token to the target's first."""
    copied_bytes: int = 0
    copy_s: float = 0.0
    prefilled_tokens: int = 0
    prefill_s: float = 0.0


class FailureCount(Message):
    """How many moves failed for a reason."""

    reason: str
    count: int


SequenceState = Literal["running", "placed", "moving", "waiting"]
SEQUENCE_STATES: tuple[SequenceState, ...] = ("running", "placed", "moving", "waiting")


class SequenceStatus(Message):
    """One sequence in a status; `placed` is not confirmed by a report yet, `waiting` has no place."""

    sequence: Id
    request_id: str = ""
    """The `x-request-id` of its request, where it is known."""
    state: SequenceState
    worker: str = ""
    target: str = ""
    tokens: int = 0
    blocks: int = 0
    moves: int = 0
    """Committed since the scheduler has known it."""


class Status(Message):
    """The answer to `StatusRequest`."""

    kind: Literal["status_reply"] = "status_reply"
    scheduler: Id
    policy: str
    uptime_s: float
    workers: tuple[WorkerStatus, ...]
    queued: int
    placed: int
    rejected: int
    migrating: int = 0
    """Moves under way."""
    migrated: int = 0
    migrations_failed: int = 0
    models: tuple[ModelStatus, ...] = ()
    settled: bool = True
    """Not so while a scheduler has just begun to lead and may not know everybody yet."""
    moves_paused: bool = False
    moves: tuple[MoveStatus, ...] = ()
    """Under way."""
    recent_moves: tuple[MoveStatus, ...] = ()
    """Over, the latest first."""
    failures: tuple[FailureCount, ...] = ()
    """Failed moves since this scheduler started, by reason."""
    sequences: tuple[SequenceStatus, ...] = ()
    sequences_left_out: int = 0
    gpu_use: GpuUse | None = None


NOWHERE = 2**32 - 1
"""No position in a list."""


class Live(Message):
    """The answer to `LiveRequest`: a status whose sequences are columns, one row each, worker by worker.

    `workers` and `targets` are positions in `status.workers`, `NOWHERE` if there is none; `states` in
    `SEQUENCE_STATES`. `used_lately` and `shadow_lately` are the GPUs in use at the last epochs, the latest last.
    """

    kind: Literal["live_reply"] = "live_reply"
    status: Status
    sequences: tuple[Id, ...] = ()
    workers: Uint32Column = []
    targets: Uint32Column = []
    tokens: Uint32Column = []
    blocks: Uint32Column = []
    states: Uint32Column = []
    sample_s: float = 1.0
    """Time between two of the next."""
    used_lately: Uint32Column = []
    shadow_lately: Uint32Column = []

    @model_validator(mode="after")
    def _rows_match(self) -> Self:
        require_equal_lengths(
            sequences=self.sequences,
            workers=self.workers,
            targets=self.targets,
            tokens=self.tokens,
            blocks=self.blocks,
            states=self.states,
        )
        return self


class DrainRow(Message):
    """A sequence of a draining worker: where it would go now, or (without a target) why nowhere."""

    sequence: Id
    blocks: int
    target: str = ""
    why: str = ""


class DrainReply(Message):
    """Whether the worker drains (with `dry_run`: would), and where its sequences would go."""

    kind: Literal["drain_reply"] = "drain_reply"
    worker: Id
    name: str
    draining: bool
    dry_run: bool = False
    deadline_s: float | None = None
    sequences: tuple[DrainRow, ...] = ()


class MoveResult(Message):
    """How an operator's move of one sequence stands; `there`: it was at the target already."""

    sequence: Id
    state: Literal["moving", "committed", "failed", "there", "refused"]
    reason: str = ""
    """Why it failed or was refused, in one word; `message` says it in full."""
    message: str = ""
    move: MoveStatus | None = None


class MigrateReply(Message):
    """How all moves of an ask stand; the same ask again tells how they go on."""

    kind: Literal["migrate_reply"] = "migrate_reply"
    target: Id
    moves: tuple[MoveResult, ...]


class MovingReply(Message):
    """Whether the planning of moves is paused. Not `kept`: schedulers started later may not know of it."""

    kind: Literal["moving_reply"] = "moving_reply"
    paused: bool
    kept: bool = True


class Happening(Message):
    """One thing that happened to a sequence.

    `placed`: given a worker; `found`: seen in a worker's report, placed by an earlier leader; `moving`: a move begun;
    `moved`, `stayed`: how it came out; `gone`: its worker holds it no more.
    """

    what: Literal["placed", "found", "moving", "moved", "stayed", "gone"]
    ago_s: float
    worker: Id
    generation: Generation
    why: str = ""
    blocks: int = 0
    """Asked for, at a placement."""
    free_blocks: int = 0
    """What the worker had left, just before."""
    waited_s: float = 0.0
    move: MoveStatus | None = None


class Story(Message):
    """All that the scheduler remembers of one sequence."""

    sequence: Id
    request_id: str = ""
    model: str = ""
    state: Literal["running", "placed", "moving", "waiting", "over"]
    position: int = 0
    """Of one that waits: how many are before it."""
    waited_s: float = 0.0
    worker: str = ""
    tokens: int = 0
    blocks: int = 0
    happenings: tuple[Happening, ...] = ()
    left_out: int = 0
    """Happenings after the first that are no longer remembered."""


class Explanation(Message):
    """The answer to `ExplainRequest`: a story for each sequence of the request."""

    kind: Literal["explanation"] = "explanation"
    stories: tuple[Story, ...]


AdminRefusal = Literal[
    "invalid",
    "unknown_worker",
    "unknown_request",
    "ambiguous",
    "over",
    "not_running",
    "wrong_model",
    "unsupported",
    "no_room",
    "draining",
    "silent",
    "already_moving",
    "stopping",
    "unreachable",
    "not_ready",
    "not_leader",
    "overloaded",
]


class AdminRefused(Message):
    """Nothing was done; the message says why, and what to do.

    `not_running`, `not_ready`, `not_leader`, `unreachable`, `overloaded`: the same may be possible in a moment.
    """

    kind: Literal["admin_refused"] = "admin_refused"
    reason: AdminRefusal
    message: str


AdminReply = Annotated[
    Status | Live | DrainReply | MigrateReply | MovingReply | Explanation | AdminRefused,
    Field(discriminator="kind"),
]

STATUS: TypeAdapter[Status] = TypeAdapter(Status)
ADMIN_REQUEST: TypeAdapter[AdminRequest] = TypeAdapter(AdminRequest)
ADMIN_REPLY: TypeAdapter[AdminReply] = TypeAdapter(AdminReply)
