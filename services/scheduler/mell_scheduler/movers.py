"""Orders sent to workers: what is not an acceptance becomes an event for the core, or an operator's answer."""

from mell_scheduler.core import OrderDrain, StartMigration
from mell_shared.bus import Bus, BusError
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
)
from mell_shared.subjects import Subjects


class Movers:
    """Asks sources; waits at most `timeout_s` for each answer."""

    def __init__(self, bus: Bus, subjects: Subjects, timeout_s: float) -> None:
        self._bus = bus
        self._subjects = subjects
        self._timeout_s = timeout_s

    async def order(self, command: StartMigration) -> MigrationFailed | None:
        """Send an order; None if the source begins, else why it does not, as far as is known."""
        order = command.order
        try:
            subject = self._subjects.worker_commands(command.source)
            reply = decode(WORKER_REPLY, await self._bus.request(subject, encode(order), self._timeout_s))
        except BusError as error:
            return _failed(command, "unreachable", str(error))
        except InvalidMessageError as error:
            return _failed(command, "unsupported", f"an answer that makes no sense: {error}")
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
