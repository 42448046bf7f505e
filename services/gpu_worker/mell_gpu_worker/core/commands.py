"""What a worker's core wants done. Closed and complete: its shell can do nothing else."""

from dataclasses import dataclass

from mell_gpu_worker.core.step import StepRow
from mell_shared.messages.frontend import AbortMigration, Claim, Evicted, StreamStatus, TokensGenerated
from mell_shared.messages.scheduler import SchedulerEvent
from mell_shared.messages.worker import PeerCommand, WorkerReply


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the command that came with `reply_to`."""

    reply_to: str
    message: WorkerReply


@dataclass(frozen=True, slots=True)
class RunStep:
    """Let the engine compute `rows`; ends in `StepFinished` or `EngineFailed`. One at a time."""

    rows: tuple[StepRow, ...]


@dataclass(frozen=True, slots=True)
class Rest:
    """Nobody runs until the next `RunStep`: let an engine with a pace of its own drop what it does for anybody."""


@dataclass(frozen=True, slots=True)
class PublishTokens:
    """Send to a frontend and forget; lost ones are asked for again."""

    frontend: str
    message: TokensGenerated


@dataclass(frozen=True, slots=True)
class PublishEvent:
    """Send to the schedulers and forget."""

    message: SchedulerEvent


@dataclass(frozen=True, slots=True)
class AskStatus:
    """Request a frontend's view of its sequences; ends in `StatusAnswered` or `StatusUnanswered`."""

    frontend: str
    message: StreamStatus


@dataclass(frozen=True, slots=True)
class SendEvicted:
    """Give a sequence back to its frontend; ends in `EvictionAnswered` or `EvictionUnanswered`."""

    frontend: str
    message: Evicted


@dataclass(frozen=True, slots=True)
class AskPeer:
    """Request something of another worker; ends in `PeerAnswered` or `PeerUnanswered`, `timeout_us` later at most."""

    worker: str
    message: PeerCommand
    timeout_us: int


@dataclass(frozen=True, slots=True)
class AskFrontend:
    """Request a frontend's ruling; ends in `FrontendAnswered` or `FrontendUnanswered`, `timeout_us` later at most."""

    frontend: str
    message: Claim | AbortMigration
    timeout_us: int


@dataclass(frozen=True, slots=True)
class OfferKv:
    """Offer pool blocks to be filled, slot by slot in this order, under a fresh secret; may be none.

    Ends in `KvOffered` or `LinkFailed`. From `KvOffered` on each finished round is told as `RoundArrived`, the end of
    the transfer (the peer has left, damage, the lifetime is over) as one `LinkFailed`. The blocks are lent until
    `LinkClosed`, also after a `LinkFailed`.
    """

    migration: str
    blocks: tuple[int, ...]
    lifetime_us: int


@dataclass(frozen=True, slots=True)
class OpenLink:
    """Connect to a peer's offer; ends in `LinkOpened` or `LinkFailed`, `timeout_us` later at most."""

    migration: str
    address: str
    secret: bytes
    size_bytes: int
    timeout_us: int


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Send pool blocks into slots, as (slot, block) pairs, over the open link; one at a time for each migration.

    Ends in `BlocksSent` or `LinkFailed`, `timeout_us` later at most. The blocks are lent until `BlocksSent` or, if it
    does not come, until `LinkClosed`.
    """

    migration: str
    blocks: tuple[tuple[int, int], ...]
    timeout_us: int


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Close this end of a migration's transfer, in whatever state it is (perhaps not even begun, perhaps failed).

    Ends in `LinkClosed`, always and soon. No other event of this migration's link may follow that one; a command
    under way ends with it.
    """

    migration: str


@dataclass(frozen=True, slots=True)
class TellDropped:
    """Log that room held for an incoming migration was freed for a reason that no reply and no event tells."""

    migration: str
    sequence: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Exit:
    """Everything is said: stop the process. `failure` is empty after a clean stop."""

    failure: str = ""


LinkCommand = OfferKv | OpenLink | SendBlocks | CloseLink
"""What a migration's transfer is asked to do."""

Command = (
    Reply
    | RunStep
    | Rest
    | PublishTokens
    | PublishEvent
    | AskStatus
    | SendEvicted
    | AskPeer
    | AskFrontend
    | LinkCommand
    | TellDropped
    | Exit
)
