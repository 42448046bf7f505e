"""All that can happen to the stream core; a closed union, each in the past tense.

Who interprets a command that asks a peer (`AskPlacement`, `SubmitSequence`, `AskResend`, `CancelSequence`) owes
exactly one event for it: the answer, or that it failed.
"""

from dataclasses import dataclass
from typing import Literal

from mell_frontend.generation import SequenceRequest
from mell_shared.messages.frontend import FrontendControl, TokensGenerated
from mell_shared.messages.scheduler import PlaceReply
from mell_shared.messages.worker import CommandInvalid, SubmitAccepted, SubmitRefused

AskFailure = Literal["timeout", "no_responder", "disconnected", "invalid"]
"""`timeout`: the peer may have acted; `invalid`: it answered what we cannot read; else it got nothing."""


@dataclass(frozen=True, slots=True)
class SequenceOpened:
    """The HTTP side wants a sequence; its name is new."""

    request: SequenceRequest


@dataclass(frozen=True, slots=True)
class SequenceClosed:
    """The HTTP side is done with a sequence, ended or not."""

    sequence: str


@dataclass(frozen=True, slots=True)
class PlaceAnswered:
    """The scheduler answered the ask of that number."""

    sequence: str
    ask: int
    reply: PlaceReply


@dataclass(frozen=True, slots=True)
class PlaceFailed:
    """The scheduler did not answer the ask of that number."""

    sequence: str
    ask: int
    failure: AskFailure


@dataclass(frozen=True, slots=True)
class SubmitAnswered:
    """The worker answered the ask of that number."""

    sequence: str
    ask: int
    reply: SubmitAccepted | SubmitRefused | CommandInvalid


@dataclass(frozen=True, slots=True)
class SubmitFailed:
    """The worker did not answer the ask of that number; unless nobody got it, it may run the sequence."""

    sequence: str
    ask: int
    failure: AskFailure


@dataclass(frozen=True, slots=True)
class SubmitTooLong:
    """The message of that ask is over the broker's limit; `limit_tokens` would about fit."""

    sequence: str
    ask: int
    limit_tokens: int


@dataclass(frozen=True, slots=True)
class ResendAnswered:
    """The worker sends again (`known`), or does not have the sequence in that generation."""

    sequence: str
    generation: int
    known: bool


@dataclass(frozen=True, slots=True)
class ResendFailed:
    """The worker did not answer a `Resend`."""

    sequence: str
    generation: int
    failure: AskFailure


@dataclass(frozen=True, slots=True)
class CancelAnswered:
    """The worker holds nothing of the sequence in that generation."""

    sequence: str
    generation: int


@dataclass(frozen=True, slots=True)
class CancelFailed:
    """The worker did not answer a `Cancel`."""

    sequence: str
    generation: int
    failure: AskFailure


@dataclass(frozen=True, slots=True)
class TokensArrived:
    """A worker's step made tokens for sequences of this frontend, or says that it did."""

    message: TokensGenerated


@dataclass(frozen=True, slots=True)
class ControlArrived:
    """A worker asks; the answer goes to `reply_to`."""

    reply_to: str
    message: FrontendControl


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Our own connection to the broker went down."""


@dataclass(frozen=True, slots=True)
class ConnectionRestored:
    """Our own connection to the broker is up again, perhaps after a loss too short to be noticed."""


@dataclass(frozen=True, slots=True)
class StoodStill:
    """This process did nothing for a while, as when its machine is paused: what others said may be unread."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed; comes several times a second."""


Event = (
    TokensArrived
    | ControlArrived
    | SequenceOpened
    | SequenceClosed
    | PlaceAnswered
    | PlaceFailed
    | SubmitAnswered
    | SubmitFailed
    | SubmitTooLong
    | ResendAnswered
    | ResendFailed
    | CancelAnswered
    | CancelFailed
    | ConnectionLost
    | ConnectionRestored
    | StoodStill
    | Ticked
)
