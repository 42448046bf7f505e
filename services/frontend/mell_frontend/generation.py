"""What the HTTP side asks of the gateway, and what it gets: one stream of token ids for each sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mell_shared.messages.admin import AdminReply, AdminRequest
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import FinishReason, SamplingParams


class GenerationError(Exception):
    """A sequence could not be run or finished; `kind` says whose fault it is.

    Kinds: `too_large` (400; `limit_tokens` says what fits), `unknown_model` (404), `queue_full` (429),
    `unavailable` (503: no worker, no scheduler, no broker), `refused` (400: the worker says the request is bad),
    `failed` (500: the engine could not go on). `in_doubt`: it may have been heard, and done, all the same.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        limit_tokens: int | None = None,
        in_doubt: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.in_doubt = in_doubt
        self.message = message
        self.retry_after_s = retry_after_s
        self.limit_tokens = limit_tokens


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One choice of a request, ready to be placed."""

    sequence: str
    model: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    priority: int = 0
    request_id: str = ""
    """What the client and the log call the request it is a choice of."""
    traceparent: str = ""
    """The trace that it belongs to, if it is traced."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The sequence is queued or being re-submitted; nothing new to show. Comes at least every second."""

    position: int


@dataclass(slots=True)
class Delta:
    """All tokens that came since the last one, in order, exactly once; the last delta has a finish reason."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """As many as `token_ids` if they were asked for, else empty."""
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    """Prompt tokens that needed no prefill; known from the first delta on."""


class SequenceStream(Protocol):
    """One sequence's tokens. Whoever opened it reads it to the end or closes it."""

    async def next(self) -> Waiting | Delta:
        """Return what came since the last call, waiting for it; raises `GenerationError`.

        After a delta with a finish reason it must not be called again.
        """
        ...

    def close(self) -> None:
        """Cancel the sequence if it has not ended, on its worker too; safe to repeat, never blocks."""
        ...


class Gateway(Protocol):
    """Opens streams; the HTTP side's only way to the rest of Mell."""

    def open(self, request: SequenceRequest) -> SequenceStream:
        """Start to place and run a sequence; problems show at the stream's `next`."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the broker is connected and a scheduler answered lately."""
        ...

    @property
    def name(self) -> str:
        """The frontend's id."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether nothing new is taken any more."""
        ...

    @property
    def open_streams(self) -> int:
        """How many sequences have neither ended nor been closed."""
        ...

    @property
    def tokens_accepted(self) -> int:
        """Tokens taken from workers since the start."""
        ...

    async def admin(self, request: AdminRequest) -> AdminReply:
        """Return what the leading scheduler answers to an operator; raises `GenerationError` (`unavailable`)."""
        ...
