"""What a worker's core wants done. Closed and complete: its shell can do nothing else."""

from dataclasses import dataclass

from mell_gpu_worker.core.step import StepRow
from mell_shared.messages.frontend import Evicted, StreamStatus, TokensGenerated
from mell_shared.messages.scheduler import SchedulerEvent
from mell_shared.messages.worker import WorkerReply


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
class Exit:
    """Everything is said: stop the process. `failure` is empty after a clean stop."""

    failure: str = ""


Command = Reply | RunStep | PublishTokens | PublishEvent | AskStatus | SendEvicted | Exit
