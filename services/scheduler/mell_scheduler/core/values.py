"""What goes into the core and what comes out: closed unions of frozen values, and the core's settings."""

from dataclasses import dataclass
from typing import Literal

from mell_shared.messages.admin import (
    AdminReply,
    DrainReply,
    DrainRequest,
    MigrateRequest,
    MovingRequest,
    UndrainRequest,
)
from mell_shared.messages.base import MigrationMode
from mell_shared.messages.scheduler import (
    LaneMeasured,
    MigrationCommitted,
    MigrationFailed,
    PlaceReply,
    PlaceRequest,
    SequenceFinished,
    WorkerJoined,
    WorkerLeft,
    WorkerReport,
)
from mell_shared.messages.worker import Drain, Migrate, Undrain

Handle = str
"""Names one held request to the shell; in the live service the subject its reply goes to."""


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """What the core needs to know; times are integer microseconds."""

    report_interval_us: int = 1_000_000
    """Workers report this often."""
    epoch_us: int = 1_000_000
    """Time between two plans of moves."""
    submit_timeout_us: int = 5_000_000
    """A placement that no report confirms stops counting after this."""
    report_late_us: int = 0
    """By so much reports are taken to be late at times; that long an older one is all that a plan has."""
    plan_late_us: int = 0
    """A plan is made with the first tick after it is due: at most so much later."""
    missed_reports: int = 3
    """After so many missed reports a worker gets no placements."""
    worker_lost_us: int = 10_000_000
    """After this silence a worker is forgotten."""
    worker_grace_us: int = 5_000_000
    """How long requests wait for a worker to appear before they are told that there is none."""
    queue_limit: int = 1_000
    queue_wait_us: int = 30_000_000
    """Nobody joins a line that would make them wait longer than this at its present pace; 0: no such limit."""
    queue_hold_us: int = 800_000
    queue_renew_us: int = 3_000_000
    """A waiting request that is not repeated for this long is dropped."""
    overtake_window: int = 64
    """So many waiting requests of a model, the first in order, are tried when room appears."""
    growth_start_tokens: int = 16
    """What a model's sequences are taken to grow by in one epoch before any has been seen."""
    growth_limit_tokens: int = 512
    """Most tokens a sequence is predicted to grow by in one epoch."""
    tpot_target_us: int = 0
    """A worker whose recent step takes longer gets nothing more; 0: no such limit."""
    step_base_ns: int = 0
    step_per_sequence_ns: int = 0
    step_per_block_ns: int = 0
    """A decode step's predicted time. All 0: unknown, so that the number of sequences is the second capacity."""
    migration_timeout_us: int = 45_000_000
    """A move that nothing has settled by then has failed."""
    transfer_limit_us: int = 5_000_000
    """A move is begun only if its links and its target are through with it, and all under way, in this time."""
    max_moves_per_epoch: int = 32
    max_move_bytes_per_epoch: int = 1 << 60
    kv_bytes_per_token: int = 131_072
    link_bytes_per_s: int = 125_000_000
    prefill_tokens_per_s: int = 500
    """For workers that do not say: a grouped-query model of 8B, 1 Gbit/s, and little prefill."""
    remembered_sequences: int = 2_000
    """Sequences that are over and can still be explained; 0: nothing is remembered of any."""


@dataclass(frozen=True, slots=True)
class LeadershipTaken:
    """This scheduler leads from now on; it knows nothing yet."""

    term: int


@dataclass(frozen=True, slots=True)
class LeadershipEnded:
    """This scheduler must place nothing any more; whoever waits should ask the next leader."""


@dataclass(frozen=True, slots=True)
class ConnectionRestored:
    """The scheduler could hear nobody, its own connection being down or itself paused: nobody's silence counts."""


@dataclass(frozen=True, slots=True)
class PlaceRequested:
    """A frontend asked for a place; it gets exactly one `Reply` with this handle."""

    handle: Handle
    request: PlaceRequest


OperatorRequest = DrainRequest | UndrainRequest | MigrateRequest | MovingRequest


@dataclass(frozen=True, slots=True)
class OperatorAsked:
    """An operator wants something done; exactly one `Answer` or `OrderDrain` has this handle."""

    handle: Handle
    request: OperatorRequest


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


Event = (
    LeadershipTaken
    | LeadershipEnded
    | ConnectionRestored
    | PlaceRequested
    | OperatorAsked
    | WorkerJoined
    | WorkerReport
    | WorkerLeft
    | SequenceFinished
    | MigrationCommitted
    | MigrationFailed
    | LaneMeasured
    | Tick
)


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a held request."""

    handle: Handle
    sequence: str
    reply: PlaceReply


@dataclass(frozen=True, slots=True)
class AskReport:
    """Ask a worker (None: all) to announce itself and its state now."""

    worker: str | None


Change = Literal["joined", "refused", "heard", "silent", "draining", "undrained", "left", "lost"]


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the operators that a worker's standing changed."""

    worker: str
    change: Change
    reason: str


@dataclass(frozen=True, slots=True)
class StartMigration:
    """Send `order` to the source; a refusal or no answer comes back as `MigrationFailed` from there.

    `blocks` are held at both ends meanwhile; `predicted_us` is what the boundaries say it takes.
    """

    source: str
    order: Migrate
    blocks: int
    predicted_us: int


Outcome = Literal["committed", "failed", "timeout", "ended"]


@dataclass(frozen=True, slots=True)
class MigrationSettled:
    """Tell the operators how a move came out. `ended`: its sequence, or one of its workers, is gone.

    `predicted_us` is what the boundaries said; what it really cost is 0 where the workers do not say.
    """

    migration: str
    sequence: str
    source: str
    target: str
    outcome: Outcome
    reason: str
    mode: MigrationMode = "kv"
    cause: str = ""
    """Why it was begun."""
    blocks: int = 0
    predicted_us: int = 0
    took_us: int = 0
    """From the order to the news."""
    stopped_us: int = 0
    copied_bytes: int = 0
    copy_us: int = 0
    prefilled_tokens: int = 0
    prefill_us: int = 0

    @property
    def unpriced(self) -> bool:
        """Committed, as reports say: the news of it, which tells what it cost, may still come."""
        return self.outcome == "committed" and bool(self.reason)


@dataclass(frozen=True, slots=True)
class MigrationPriced:
    """The news of a move that was settled by a report before: the same outcome, now with its cost."""

    settled: MigrationSettled


@dataclass(frozen=True, slots=True)
class WantGpus:
    """Tell the operators, and whoever starts workers, how many a model should have."""

    model: str
    gpus: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer an operator."""

    handle: Handle
    reply: AdminReply


@dataclass(frozen=True, slots=True)
class OrderDrain:
    """Send an order to a worker, and answer the operator: with `reply` if it obeys, else with why it does not."""

    worker: str
    order: Drain | Undrain
    handle: Handle
    reply: DrainReply


Command = (
    Answer | OrderDrain | Reply | AskReport | Announce | StartMigration | MigrationSettled | MigrationPriced | WantGpus
)
