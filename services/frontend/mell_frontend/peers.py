"""The scheduler and the workers as the gateway talks to them: one request with a timeout, an event for its outcome."""

from dataclasses import dataclass
from typing import TypeVar

import structlog
from pydantic import BaseModel, TypeAdapter

from mell_frontend.generation import GenerationError
from mell_frontend.stream.commands import AskPlacement, AskResend, CancelSequence, SubmitSequence
from mell_frontend.stream.events import (
    AskFailure,
    CancelAnswered,
    CancelFailed,
    PlaceAnswered,
    PlaceFailed,
    ResendAnswered,
    ResendFailed,
    SubmitAnswered,
    SubmitFailed,
    SubmitTooLong,
)
from mell_shared.bus import Bus, BusError, NoResponderError, RequestTimeoutError
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.admin import ADMIN_REPLY, AdminReply, AdminRequest
from mell_shared.messages.scheduler import PLACE_REPLY
from mell_shared.messages.worker import (
    WORKER_REPLY,
    CancelDone,
    CommandInvalid,
    ResendDone,
    SubmitAccepted,
    SubmitRefused,
)
from mell_shared.subjects import Subjects

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a peer may take to answer."""

    place_s: float = 2.0
    submit_s: float = 5.0
    command_s: float = 1.0
    admin_s: float = 4.0


@dataclass(slots=True)
class PeerStats:
    """Counts since start."""

    asks_failed: int = 0
    replies_invalid: int = 0
    replies_unsent: int = 0


class Peers:
    """Carries out the commands that ask somebody; a failure is an event like any other."""

    def __init__(self, bus: Bus, subjects: Subjects, timeouts: Timeouts) -> None:
        self.stats = PeerStats()
        self._bus = bus
        self._subjects = subjects
        self._timeouts = timeouts
        self._log = structlog.get_logger()

    async def place(self, command: AskPlacement) -> PlaceAnswered | PlaceFailed:
        """Ask the scheduler where to run a sequence."""
        data = encode(command.message)
        reply = await self._request(self._subjects.place, data, self._timeouts.place_s, PLACE_REPLY)
        if isinstance(reply, str):
            return PlaceFailed(command.message.sequence, command.ask, reply)
        return PlaceAnswered(command.message.sequence, command.ask, reply)

    async def submit(self, command: SubmitSequence) -> SubmitAnswered | SubmitFailed | SubmitTooLong:
        """Ask a worker to run a sequence."""
        message = command.message
        data = encode(message)
        if len(data) > self._bus.max_payload:
            others_bytes = len(data) - 4 * (len(message.prompt_ids) + len(message.output_ids))
            limit_tokens = max(0, self._bus.max_payload - others_bytes) // 4
            return SubmitTooLong(message.sequence, command.ask, limit_tokens)
        reply = await self._command(command.worker, data, self._timeouts.submit_s)
        if isinstance(reply, (SubmitAccepted, SubmitRefused, CommandInvalid)):
            return SubmitAnswered(message.sequence, command.ask, reply)
        return SubmitFailed(message.sequence, command.ask, _failure(reply))

    async def resend(self, command: AskResend) -> ResendAnswered | ResendFailed:
        """Ask a worker for tokens again."""
        sequence, generation = command.message.sequence, command.message.generation
        reply = await self._command(command.worker, encode(command.message), self._timeouts.command_s)
        if isinstance(reply, ResendDone):
            return ResendAnswered(sequence, generation, reply.known)
        return ResendFailed(sequence, generation, _failure(reply))

    async def cancel(self, command: CancelSequence) -> CancelAnswered | CancelFailed:
        """Tell a worker to stop a sequence."""
        sequence, generation = command.message.sequence, command.message.generation
        reply = await self._command(command.worker, encode(command.message), self._timeouts.command_s)
        if isinstance(reply, CancelDone):
            return CancelAnswered(sequence, generation)
        return CancelFailed(sequence, generation, _failure(reply))

    async def admin(self, request: AdminRequest) -> AdminReply:
        """Ask the leading scheduler what an operator asks; raises `GenerationError` (`unavailable`)."""
        subject = self._subjects.admin(request.kind)
        reply = await self._request(subject, encode(request), self._timeouts.admin_s, ADMIN_REPLY)
        if isinstance(reply, str):
            reason = reply.replace("_", " ")
            raise GenerationError(
                "unavailable", f"no scheduler answers ({reason})", retry_after_s=1.0, in_doubt=reply == "timeout"
            )
        return reply

    async def reply(self, reply_to: str, message: BaseModel) -> None:
        """Answer a worker that asked; if the answer is lost it asks again."""
        if not reply_to:
            return
        try:
            await self._bus.publish(reply_to, encode(message))
        except BusError:
            self.stats.replies_unsent += 1

    async def _command(self, worker: str, data: bytes, timeout_s: float) -> object:
        return await self._request(self._subjects.worker_commands(worker), data, timeout_s, WORKER_REPLY)

    async def _request(self, subject: str, data: bytes, timeout_s: float, replies: TypeAdapter[M]) -> M | AskFailure:
        """Return the peer's reply, or why there is none."""
        failure: AskFailure
        try:
            return decode(replies, await self._bus.request(subject, data, timeout_s))
        except RequestTimeoutError:
            failure = "timeout"
        except NoResponderError:
            failure = "no_responder"
        except InvalidMessageError as error:
            self.stats.replies_invalid += 1
            self._log.warning("reply_dropped", subject=subject, why=str(error))
            failure = "invalid"
        except BusError:
            failure = "disconnected"
        self.stats.asks_failed += 1
        return failure


def _failure(reply: object) -> AskFailure:
    """Return the failure itself; a reply of the wrong kind is as good as none that can be read."""
    match reply:
        case "timeout" | "no_responder" | "disconnected":
            return reply
        case _:
            return "invalid"
