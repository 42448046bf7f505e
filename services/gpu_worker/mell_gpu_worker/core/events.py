"""What happens to a worker, as its core sees it. Closed and complete: nothing else can happen."""

from dataclasses import dataclass
from typing import Literal

from mell_gpu_worker.core.step import StepResult
from mell_shared.messages.frontend import AbortMigration, Claim, FrontendReply, StreamStatus, StreamStatusReply
from mell_shared.messages.worker import PeerCommand, WorkerCommand, WorkerReply

AskFailure = Literal["timeout", "no_responder", "disconnected", "invalid"]
"""Why a peer gave no answer. `timeout`, `invalid` (it answered what cannot be read): it may have acted; else not."""
LinkFailure = Literal["link", "unreachable", "corrupt", "timeout", "refused"]
"""Why a transfer ended, or never began; all but `refused` are also reasons of `MigrationFailed`."""


@dataclass(frozen=True, slots=True)
class CommandReceived:
    """A command came; `reply_to` is empty if nobody waits for a reply.

    `grammar_fault` says why the engine cannot use the grammar of a submission or a reservation.
    """

    command: WorkerCommand
    reply_to: str = ""
    grammar_fault: str | None = None


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The engine is done with the rows of the last `RunStep`."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine cannot go on; the step being computed, if any, will never finish."""

    message: str


@dataclass(frozen=True, slots=True)
class PoolMeasured:
    """What an engine whose blocks are estimated says of its memory; it answers, so it is there."""

    blocks: int
    used_blocks: int
    waiting: int
    """Requests that it has no room for."""
    step_us: int = 0
    """Mean time from one token of a sequence to the next; 0: not known."""


@dataclass(frozen=True, slots=True)
class EngineAway:
    """The engine cannot be reached, perhaps for long; the step being computed, if any, will still finish."""

    message: str


@dataclass(frozen=True, slots=True)
class StatusAnswered:
    """A frontend's answer to `status`."""

    frontend: str
    status: StreamStatus
    reply: StreamStatusReply


@dataclass(frozen=True, slots=True)
class StatusUnanswered:
    """A frontend did not answer a status in time, or not sensibly."""

    frontend: str


@dataclass(frozen=True, slots=True)
class EvictionAnswered:
    """A frontend knows that a sequence was given up here."""

    sequence: str
    generation: int


@dataclass(frozen=True, slots=True)
class EvictionUnanswered:
    """A frontend did not answer an eviction in time."""

    sequence: str
    generation: int


@dataclass(frozen=True, slots=True)
class PeerAnswered:
    """Another worker's answer to `message` (`CommandInvalid` included)."""

    worker: str
    message: PeerCommand
    reply: WorkerReply


@dataclass(frozen=True, slots=True)
class PeerUnanswered:
    """Another worker did not answer `message` in time, or not sensibly."""

    worker: str
    message: PeerCommand
    failure: AskFailure


@dataclass(frozen=True, slots=True)
class FrontendAnswered:
    """A frontend's answer to `message`."""

    frontend: str
    message: Claim | AbortMigration
    reply: FrontendReply


@dataclass(frozen=True, slots=True)
class FrontendUnanswered:
    """A frontend did not answer `message` in time, or not sensibly."""

    frontend: str
    message: Claim | AbortMigration


@dataclass(frozen=True, slots=True)
class KvOffered:
    """The blocks of `OfferKv` wait to be filled by whoever names secret and size."""

    migration: str
    address: str
    secret: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RoundArrived:
    """A round is in place in the offered blocks, and its checksums were right."""

    migration: str
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """The peer has accepted the connection."""

    migration: str


@dataclass(frozen=True, slots=True)
class BlocksSent:
    """The peer has confirmed all blocks of the last `SendBlocks`."""

    migration: str
    size_bytes: int
    took_us: int


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """The transfer is over, or never began; `message` says why in words fit for a log."""

    migration: str
    reason: LinkFailure
    message: str


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """This end of the transfer is closed: nothing reads or writes the blocks lent to it any more."""

    migration: str


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection to the broker is down."""


@dataclass(frozen=True, slots=True)
class ConnectionRestored:
    """The connection to the broker is up again; anything sent before may be lost."""


@dataclass(frozen=True, slots=True)
class StoodStill:
    """This process did nothing for a while, as when its machine is paused: what others said may be unread."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Finish what runs, take nothing new; a repeat changes nothing."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Time has come to `WorkerCore.wake_us`, or not quite."""


LinkEvent = KvOffered | RoundArrived | LinkOpened | BlocksSent | LinkFailed | LinkClosed
"""What happens to a migration's transfer."""

Event = (
    CommandReceived
    | StepFinished
    | EngineFailed
    | PoolMeasured
    | EngineAway
    | StatusAnswered
    | StatusUnanswered
    | EvictionAnswered
    | EvictionUnanswered
    | PeerAnswered
    | PeerUnanswered
    | FrontendAnswered
    | FrontendUnanswered
    | LinkEvent
    | ConnectionLost
    | ConnectionRestored
    | StoodStill
    | StopRequested
    | TimePassed
)
