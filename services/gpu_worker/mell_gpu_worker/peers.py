"""Questions to frontends and other workers: each ends as an event, an answer or its absence, in bounded time."""

from collections.abc import Callable

import structlog

from mell_gpu_worker.core.commands import AskFrontend, AskPeer, AskStatus, SendEvicted
from mell_gpu_worker.core.events import (
    AskFailure,
    EvictionAnswered,
    EvictionUnanswered,
    FrontendAnswered,
    FrontendUnanswered,
    PeerAnswered,
    PeerUnanswered,
    StatusAnswered,
    StatusUnanswered,
)
from mell_gpu_worker.metrics import WorkerCounts
from mell_shared.bus import Bus, BusClosedError, BusError, RequestTimeoutError
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.base import Message
from mell_shared.messages.frontend import (
    FRONTEND_REPLY,
    EvictionTaken,
    FrontendReply,
    Refused,
    StreamStatusReply,
)
from mell_shared.messages.worker import WORKER_REPLY, PeerCommand
from mell_shared.subjects import Subjects

FRONTEND_TIMEOUT_S = 1.0
"""For a frontend's answer to a status or an eviction."""

Question = AskPeer | AskFrontend | AskStatus | SendEvicted
Answer = (
    PeerAnswered
    | PeerUnanswered
    | FrontendAnswered
    | FrontendUnanswered
    | StatusAnswered
    | StatusUnanswered
    | EvictionAnswered
    | EvictionUnanswered
)


class Peers:
    """Asks on a bus; answers that make no sense are counted and logged."""

    def __init__(
        self, bus: Bus, subjects: Subjects, counts: WorkerCounts, outgoing: Callable[[PeerCommand], PeerCommand]
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._counts = counts
        self._outgoing = outgoing
        """Adds to a question, on its way, what the core does not know: the trace it belongs to."""
        self._log = structlog.get_logger()

    async def ask(self, question: Question) -> Answer:
        """Ask, and return what became of it."""
        match question:
            case AskPeer():
                return await self._ask_worker(question)
            case AskFrontend():
                return await self._ask_ruling(question)
            case AskStatus():
                return await self._ask_status(question)
            case SendEvicted():
                return await self._send_evicted(question)

    async def _ask_worker(self, command: AskPeer) -> PeerAnswered | PeerUnanswered:
        worker, message = command.worker, command.message
        try:
            asked = encode(self._outgoing(message))
            data = await self._bus.request(self._subjects.worker_commands(worker), asked, command.timeout_us / 1e6)
            return PeerAnswered(worker, message, decode(WORKER_REPLY, data))
        except BusError as error:
            failure = _failure(error)
            self._log.debug("worker_silent", worker=worker, question=message.kind, failure=failure, why=str(error))
        except InvalidMessageError as error:
            failure = "invalid"
            self._reject(error, worker=worker)
        return PeerUnanswered(worker, message, failure)

    async def _ask_ruling(self, command: AskFrontend) -> FrontendAnswered | FrontendUnanswered:
        frontend, message = command.frontend, command.message
        reply = await self._ask_frontend(frontend, message, command.timeout_us / 1e6)
        if reply is None:
            return FrontendUnanswered(frontend, message)
        return FrontendAnswered(frontend, message, reply)

    async def _ask_status(self, command: AskStatus) -> StatusAnswered | StatusUnanswered:
        frontend, status = command.frontend, command.message
        reply = await self._ask_frontend(frontend, status, FRONTEND_TIMEOUT_S)
        if isinstance(reply, StreamStatusReply):
            return StatusAnswered(frontend, status, reply)
        return StatusUnanswered(frontend)

    async def _send_evicted(self, command: SendEvicted) -> EvictionAnswered | EvictionUnanswered:
        key = (command.message.sequence, command.message.generation)
        reply = await self._ask_frontend(command.frontend, command.message, FRONTEND_TIMEOUT_S)
        known = isinstance(reply, EvictionTaken | Refused)
        return EvictionAnswered(*key) if known else EvictionUnanswered(*key)

    async def _ask_frontend(self, frontend: str, message: Message, timeout_s: float) -> FrontendReply | None:
        """Return a frontend's answer, or None if none came in time or it makes no sense."""
        try:
            data = await self._bus.request(self._subjects.frontend_control(frontend), encode(message), timeout_s)
            return decode(FRONTEND_REPLY, data)
        except BusError as error:
            self._log.debug("frontend_silent", frontend=frontend, why=str(error))
        except InvalidMessageError as error:
            self._reject(error, frontend=frontend)
        return None

    def _reject(self, error: InvalidMessageError, **sender: str) -> None:
        self._counts.invalid_messages += 1
        self._log.warning("invalid_reply", fault=str(error), **sender)


def _failure(error: BusError) -> AskFailure:
    match error:
        case RequestTimeoutError():
            return "timeout"
        case BusClosedError():
            return "disconnected"
        case _:
            return "no_responder"  # nobody there, or nothing that could be sent to anybody
