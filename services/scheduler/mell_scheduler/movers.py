"""Orders sent to workers: what is not an acceptance becomes an event for the core, or an operator's answer."""

from mell_scheduler.core import OrderDrain, StartMigration
from mell_shared.bus import Bus, BusError, RequestTimeoutError
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.admin import AdminRefused, DrainReply
from mell_shared.messages.scheduler import MigrationFailed
from mell_shared.messages.worker import (
    WORKER_REPLY,
    CommandInvalid,
    DrainRefused,
    DrainSet,
    MigrateAccepted,
    MigrateRefused,
    WorkerReply,
)
from mell_shared.subjects import Subjects

_TRIES = 3
"""Times that an order to move is sent while no answer comes; a repeat gets the first answer."""


class Movers:
    """Asks sources; waits at most `timeout_s` for each answer."""

    def __init__(self, bus: Bus, subjects: Subjects, timeout_s: float) -> None:
        self._bus = bus
        self._subjects = subjects
        self._timeout_s = timeout_s

    async def order(self, command: StartMigration) -> MigrationFailed | None:
        """Send an order; None if the source begins, or may have: its events, or the core's deadline, decide then.

        Else why it does not.
        """
        try:
            data = await self._request(self._subjects.worker_commands(command.source), encode(command.order))
            return None if data is None else _failure(command, decode(WORKER_REPLY, data))
        except BusError as error:
            return _failed(command, "unreachable", str(error))
        except InvalidMessageError as error:
            return _failed(command, "unsupported", f"an answer that makes no sense: {error}")

    async def _request(self, subject: str, order: bytes) -> bytes | None:
        for _ in range(_TRIES):
            try:
                return await self._bus.request(subject, order, self._timeout_s)
            except RequestTimeoutError:
                continue
        return None

    async def drain(self, command: OrderDrain) -> DrainReply | AdminRefused:
        """Send an order to drain, or the end of one; returns what to tell the operator."""
        worker = command.worker
        try:
            subject = self._subjects.worker_commands(worker)
            reply = decode(WORKER_REPLY, await self._bus.request(subject, encode(command.order), self._timeout_s))
        except (BusError, InvalidMessageError) as error:
            text = f"{worker} does not answer ({error}); it may drain all the same: see mell status"
            return AdminRefused(reason="unreachable", message=text)
        match reply:
            case DrainSet():
                return command.reply
            case DrainRefused(reason="term"):
                return AdminRefused(reason="not_leader", message=f"{worker} refuses: {reply.message}; ask again")
            case DrainRefused(message=message):
                return AdminRefused(reason="stopping", message=f"{worker}: {message}, and drains by itself")
            case _:
                return AdminRefused(reason="unsupported", message=f"{worker} is of a release that cannot be drained")


def _failure(command: StartMigration, reply: WorkerReply) -> MigrationFailed | None:
    match reply:
        case MigrateAccepted():
            return None
        case MigrateRefused(reason=reason, message=message):
            return _failed(command, reason, message)
        case CommandInvalid(message=message):
            # A worker of a release that knows no moves.
            return _failed(command, "unsupported", message)
        case _:
            return _failed(command, "unsupported", f"answered {reply.kind}")


def _failed(command: StartMigration, reason: str, message: str) -> MigrationFailed:
    order = command.order
    return MigrationFailed(
        worker=command.source,
        migration=order.migration,
        sequence=order.sequence,
        generation=order.generation,
        reason=reason,
        message=message,
    )
