"""All that the stream core can ask for; a closed union of values without callbacks, each in the imperative."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mell_shared.messages.frontend import FrontendReply, TokenLogprobs
from mell_shared.messages.sampling import FinishReason
from mell_shared.messages.scheduler import PlaceRequest
from mell_shared.messages.worker import Cancel, Resend, Submit

FailureKind = Literal["too_large", "unknown_model", "queue_full", "unavailable", "refused", "failed"]
"""The kinds of `GenerationError`."""


@dataclass(frozen=True, slots=True)
class AskPlacement:
    """Ask the scheduler; answer with `PlaceAnswered` or `PlaceFailed` of the same number.

    `cause`: why the sequence has lost the place it had; empty if it had none since the last ask.
    """

    ask: int
    message: PlaceRequest
    cause: str = ""


@dataclass(frozen=True, slots=True)
class SubmitSequence:
    """Ask the worker; answer with `SubmitAnswered`, `SubmitFailed` or `SubmitTooLong` of the same number."""

    worker: str
    ask: int
    message: Submit


@dataclass(frozen=True, slots=True)
class AskResend:
    """Ask the worker; answer with `ResendAnswered` or `ResendFailed`."""

    worker: str
    message: Resend


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """Tell the worker; answer with `CancelAnswered` or `CancelFailed`."""

    worker: str
    message: Cancel


@dataclass(frozen=True, slots=True)
class ReplyControl:
    """Publish the reply to one `ControlArrived`; if it is lost, the worker asks again."""

    reply_to: str
    reply: FrontendReply


class DeliverTokens(NamedTuple):
    """Hand the next tokens to the reader, each exactly once; with a finish reason it is the sequence's last command.

    One is made for every token and sequence, so it is a named tuple: making a frozen dataclass takes twice as long.
    """

    sequence: str
    token_ids: list[int]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TellWaiting:
    """Tell the reader that the sequence waits; position 0 while it is being placed again."""

    sequence: str
    position: int


@dataclass(frozen=True, slots=True)
class FailSequence:
    """Tell the reader that the sequence cannot go on; its last command."""

    sequence: str
    failure: FailureKind
    message: str
    retry_after_s: float | None = None
    limit_tokens: int | None = None


Command = (
    DeliverTokens
    | ReplyControl
    | AskPlacement
    | SubmitSequence
    | AskResend
    | CancelSequence
    | TellWaiting
    | FailSequence
)
