"""What happens to a worker, as its core sees it. Closed and complete: nothing else can happen."""

from dataclasses import dataclass

from mell_gpu_worker.core.step import StepResult
from mell_shared.messages.frontend import StreamStatus, StreamStatusReply
from mell_shared.messages.worker import WorkerCommand


@dataclass(frozen=True, slots=True)
class CommandReceived:
    """A command came; `reply_to` is empty if nobody waits for a reply.

    `grammar_fault` says why the engine cannot use a submission's grammar.
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
class ConnectionLost:
    """The connection to the broker is down."""


@dataclass(frozen=True, slots=True)
class ConnectionRestored:
    """The connection to the broker is up again; anything sent before may be lost."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Finish what runs, take nothing new; a repeat changes nothing."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Time has come to `WorkerCore.wake_us`, or not quite."""


Event = (
    CommandReceived
    | StepFinished
    | EngineFailed
    | StatusAnswered
    | StatusUnanswered
    | EvictionAnswered
    | EvictionUnanswered
    | ConnectionLost
    | ConnectionRestored
    | StopRequested
    | TimePassed
)
